//! How something gets its name on a server that renames: it has a temporary one until it is whole.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use super::{ATTEMPTS, Aside, Store, contended};
use crate::carry::entry::{Kind, Stamp};

/// A store whose server renames what is in one directory.
pub(super) trait Names: Store {
    /// A name for what is not whole yet, that nobody else uses.
    fn temporary(&self) -> OsString;

    /// Gives what is at `from`, of this kind, a name beside it that nothing has; else it fails.
    fn rename(&self, from: &Path, to: &Path, kind: Kind) -> io::Result<()>;

    /// Whether that is known to fail for a file where something has the name. Else it is looked at before.
    fn refuses_to_replace(&self) -> bool {
        false
    }

    /// The same for a file, in the place of the file or link that has the name.
    fn replace(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Has something of this kind written under a temporary name, and then gives it its own. What failed leaves nothing.
    fn leave(
        &self,
        path: &Path,
        kind: Kind,
        aside: Aside<'_>,
        write: impl FnOnce(&Path) -> io::Result<Stamp>,
    ) -> io::Result<Stamp> {
        let temporary = path.with_file_name(self.temporary());
        let left =
            write(&temporary).and_then(|stamp| self.expose(&temporary, path, kind, aside).map(|()| stamp));
        if left.is_err() {
            let _ = self.remove(&temporary, Kind::File);
        }
        left
    }

    /// Gives what is called `temporary`, beside it, its name.
    fn expose(&self, temporary: &Path, path: &Path, kind: Kind, aside: Aside<'_>) -> io::Result<()> {
        for attempt in 0..ATTEMPTS {
            // A round trip less for what is new.
            let is_tried =
                attempt == 0 && kind == Kind::File && !aside.expects() && self.refuses_to_replace();
            if !is_tried && let Some(found) = self.find(path)? {
                if let Some(target) = aside.aside(&found, path)? {
                    self.keep(path, &target, found.kind, aside)?;
                } else if found.kind == Kind::Directory {
                    self.remove(path, Kind::Directory)?;
                } else {
                    return self.replace(temporary, path);
                }
            }
            match self.rename(temporary, path, Kind::File) {
                Ok(()) => return Ok(()),
                // Somebody was faster.
                Err(_) if self.find(path)?.is_some() => {}
                Err(error) => return Err(error),
            }
        }
        Err(contended())
    }

    /// Has what is in the way called `target`.
    fn keep(&self, path: &Path, target: &Path, kind: Kind, aside: Aside<'_>) -> io::Result<()> {
        let kept = self.rename(path, target, kind);
        // The server may have done it although nobody hears of that.
        if kept.is_ok() || matches!(self.find(target), Ok(Some(_))) {
            aside.kept(target);
        }
        kept
    }

    /// Has the name free for a directory, unless it is one's already.
    fn clear_for_directory(&self, path: &Path, aside: Aside<'_>) -> io::Result<()> {
        match self.find(path)? {
            Some(found) if found.kind != Kind::Directory => match aside.aside(&found, path)? {
                Some(target) => self.keep(path, &target, found.kind, aside),
                None => self.remove(path, found.kind),
            },
            _ => Ok(()),
        }
    }
}
