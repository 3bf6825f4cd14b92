//! What is compared: a session and its base, at one moment.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use memdev::attach::{Backend, Options, Source, THIS_PROGRAM};
use memdev::changes::{Disk, Disks, Ext4Pair, Layered, Mounted, MountedPair, Raw, Side, Written};
use memdev::control::model::Fork;
use memdev::load::Saved;
use memdev::net::Uri;
use memdev::root::{self, partition::Table};
use memdev::save::Remote;
use memdev::{Error, ErrorKind, Result};

use super::ChangesArgs;
use crate::cli::Failure;
use crate::cli::held::HeldSession;

/// Where one of the two is.
enum Place {
    /// An export that nobody writes to.
    Export(Uri),
    /// A file.
    File(PathBuf),
}

/// The two, for as long as this is there.
pub(super) struct Sources {
    before: Place,
    now: Place,
    /// Whether what is there may be written to: nobody else has it.
    is_ours: bool,
    /// What was made to look at.
    held: Vec<HeldSession>,
}

impl Sources {
    /// Finds what was asked for.
    pub(super) fn find(args: &ChangesArgs) -> Result<Self, Failure> {
        let what = &args.what;
        let given = args.base.clone().map(Place::File);
        if Uri::looks_like(what) {
            let uri: Uri = what.parse().map_err(|error| Failure::Usage(format!("{error}")))?;
            let before = given.map_or_else(|| new_session(&uri), Ok)?;
            return Ok(Self { before, now: Place::Export(uri), is_ours: false, held: Vec::new() });
        }
        // An ID has no slash, and a path can be given one.
        if what.contains('@') && !what.contains('/') {
            return live(args, what, given);
        }
        if !what.contains('/') && !Path::new(what).exists() {
            let uri = root::write_back(&args.directory(root::DIRECTORY, "root"), what)?;
            return live(args, &uri.export, given);
        }
        // The file may say what its base is; nothing is opened because of that.
        let before = given.ok_or_else(|| match std::fs::metadata(what) {
            Ok(_) => {
                let error = Error::new(ErrorKind::Invalid, "What to compare with was not said for");
                error.on(what).advise("give the image that it was made of with --base")
            }
            Err(error) => {
                let error = Error::io("Cannot read", error).on(what);
                error.advise("give a session, its URI, or the path of a saved image")
            }
        })?;
        Ok(Self { before, now: Place::File(what.into()), is_ours: true, held: Vec::new() })
    }

    /// As an ext4, from the disks alone.
    pub(super) fn ext4(&self, partition: Option<u32>) -> Result<Ext4Pair> {
        let mut disks = self.disks()?;
        let before = place(&mut disks, Side::Before, partition)?;
        let now = place(&mut disks, Side::Now, partition)?;
        Ext4Pair::open(disks, before, now).map_err(|error| match error.kind() {
            ErrorKind::Unsupported => error.advise("have the kernel look, as root, with --mount"),
            _ => error,
        })
    }

    fn disks(&self) -> Result<Disks> {
        match (&self.before, &self.now) {
            (before, Place::Export(uri)) => {
                let mut now = Remote::open(uri)?;
                let written = Written::of(&mut now)?;
                let before: Box<dyn Disk> = match before {
                    Place::Export(uri) => Box::new(Remote::open(uri)?),
                    Place::File(path) => Box::new(Raw::open(path)?),
                };
                if before.size() != Disk::size(&now) {
                    let message =
                        format!("The session has {} bytes, and its base cannot have", Disk::size(&now));
                    let error = Error::new(ErrorKind::Invalid, message).on(before.size());
                    return Err(error.advise("give the image that it was made of with --base"));
                }
                let mut disks = Disks::new(before, Box::new(now), written);
                disks.check_history()?;
                Ok(disks)
            }
            (Place::Export(uri), Place::File(_)) => {
                Err(Error::new(ErrorKind::Invalid, "A file is compared with an image, and not with").on(uri))
            }
            (Place::File(base), Place::File(path)) => {
                let before = Raw::open(base)?;
                if path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
                    return Ok(Disks::new(Box::new(before), Box::new(Raw::open(path)?), Written::Unknown));
                }
                let now = Layered::new(Saved::open(path, None)?, Raw::open(base)?)?;
                let written = now.written();
                Ok(Disks::new(Box::new(before), Box::new(now), written))
            }
        }
    }

    /// As what the kernel makes of it.
    pub(super) fn mounted(&self, partition: Option<u32>, state: &Path) -> Result<MountedPair> {
        let one = |place: &Place, side: Side| {
            let source = match place {
                Place::Export(uri) => Source::Export(uri.clone()),
                Place::File(path) => {
                    if Saved::open(path, None).is_ok_and(|saved| saved.backing().is_some()) {
                        let error =
                            Error::new(ErrorKind::Unsupported, "Only raw images are mounted, and not");
                        return Err(error.on(path.display()).advise("load it into a session: memdev load"));
                    }
                    Source::Image { name: "image".into(), path: path.clone() }
                }
            };
            let options = Options {
                source,
                device: None,
                connections: 1,
                memory: None,
                // A journal is replayed when it is mounted; in somebody's session nothing is.
                read_only: side == Side::Now && !self.is_ours,
                // Only a loop device can be a part of what is attached.
                backend: if partition.is_some() { Backend::Fuse } else { Backend::Auto },
                state: state.to_owned(),
                log: None,
                program: THIS_PROGRAM.into(),
                die_with_parent: true,
                while_used: false,
                root: None,
                // One of the two only reads.
                warn: |_| {},
            };
            Mounted::attach(&options, partition, side)
        };
        Ok(MountedPair::new(one(&self.before, Side::Before)?, one(&self.now, Side::Now)?))
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        // The fork of a fork goes before it.
        while self.held.pop().is_some() {}
    }
}

/// A live session at one moment, and its image as it was when the session began: a second fork, made what the first would
/// be if nothing had been written. The image's name may have another image by now.
fn live(args: &ChangesArgs, session: &str, given: Option<Place>) -> Result<Sources, Failure> {
    let fork = |session: &str| -> Result<HeldSession, Failure> {
        // The one who looks need not be the session's owner: who may control the server may read everything of it.
        let fork = Fork { id: None, unclaimed: true, held: true };
        Ok(HeldSession::new(args.control.connect()?, |client| client.fork(session, &fork))?)
    };
    let moment = fork(session)?;
    let now = Place::Export(moment.uri()?);
    if let Some(base) = given {
        if let Place::File(path) = &base {
            moment.check_base(path, session)?;
        }
        return Ok(Sources { before: base, now, is_ours: true, held: vec![moment] });
    }
    let mut base = fork(&moment.session().session.name)?;
    base.reset()?;
    Ok(Sources { before: Place::Export(base.uri()?), now, is_ours: true, held: vec![moment, base] })
}

/// The base of a session at rest: a new session on the same image.
fn new_session(uri: &Uri) -> Result<Place> {
    let Some((image, _)) = uri.export.split_once('@') else {
        let error = Error::new(ErrorKind::Invalid, "This is an image, or a session that just began:");
        return Err(error.on(uri).advise("name a session, as NAME@ID"));
    };
    Ok(Place::Export(Uri { export: image.to_owned(), ..uri.clone() }))
}

/// Where the file system is.
fn place(disks: &mut Disks, side: Side, partition: Option<u32>) -> Result<Range<u64>> {
    let size = disks.size(side);
    let Some(number) = partition else { return Ok(0..size) };
    let mut failed = None;
    let table = Table::read(size, &mut |offset, bytes| {
        disks.read(side, offset, bytes).map_err(|error| {
            failed = Some(error);
            std::io::ErrorKind::Other.into()
        })
    });
    let found = table.and_then(|table| table.find(number));
    let found =
        found.map_err(|error| failed.unwrap_or_else(|| error.on(format!("(in {})", side.owner()))))?;
    Ok(found.offset..found.offset + found.length)
}
