//! What has changed, for people and for programs.

use std::fmt::Write as _;

use memdev::Result;
use memdev::changes::{Change, Kind, Node, Pair, Stat, Tree, What, Xattrs, quoted};
use serde_json::{Map, Value, json};

use crate::cli;

/// How changes are told.
pub(super) struct Report {
    /// Whether modification times are told of.
    pub(super) times: bool,
}

impl Report {
    /// One line a change.
    pub(super) fn lines<P: Pair>(&self, pair: &mut P, list: &[&Change<Node<P>>]) -> Result<()> {
        let mut text = String::new();
        for change in list {
            let (before, now) = stats(pair, change)?;
            let letter = match (&before, &now) {
                (None, _) => 'A',
                (_, None) => 'D',
                _ => 'M',
            };
            let _ = write!(text, "{letter} {}", shown_path(&change.path));
            let mut notes = Vec::new();
            if let (Some(before), Some(now)) = (&before, &now) {
                notes.extend(self.told(change).map(|what| difference(what, before, now)));
            }
            if let Some(from) = &change.from {
                notes.push(format!("was {}", shown_path(from)));
            }
            if let Some(link) = &change.link {
                notes.push(format!("a link to {}", shown_path(link)));
            }
            if !notes.is_empty() {
                let _ = write!(text, " ({})", notes.join(", "));
            }
            text.push('\n');
            // Much of it need not be held.
            if text.len() > 64 << 10 {
                cli::print(&text)?;
                text.clear();
            }
        }
        cli::print(&text)
    }

    fn told<N>(&self, change: &Change<N>) -> impl Iterator<Item = What> {
        change.what.iter().filter(|&what| self.times || what != What::Mtime)
    }

    /// A list of objects, one a line.
    pub(super) fn json<P: Pair>(&self, pair: &mut P, list: &[&Change<Node<P>>]) -> Result<()> {
        let mut text = String::from("[");
        for (at, change) in list.iter().enumerate() {
            text.push_str(if at == 0 { "\n" } else { ",\n" });
            let _ = write!(text, "{}", self.object(pair, change)?);
            if text.len() > 64 << 10 {
                cli::print(&text)?;
                text.clear();
            }
        }
        text.push_str(if list.is_empty() { "]\n" } else { "\n]\n" });
        cli::print(&text)
    }

    fn object<P: Pair>(&self, pair: &mut P, change: &Change<Node<P>>) -> Result<Value> {
        let (before, now) = stats(pair, change)?;
        let mut object = Map::new();
        put_path(&mut object, "path", &change.path);
        let word = match (&before, &now) {
            (None, _) => "added",
            (_, None) => "deleted",
            _ => "modified",
        };
        object.insert("change".into(), word.into());
        if before.is_some() && now.is_some() {
            let names: Vec<_> = self.told(change).map(What::name).collect();
            object.insert("what".into(), names.into());
        }
        if let Some(from) = &change.from {
            put_path(&mut object, "from", from);
        }
        if let Some(link) = &change.link {
            put_path(&mut object, "link", link);
        }
        if let Some((stat, node)) = before.as_ref().zip(change.before.as_ref()) {
            let (target, xattrs) = (target(pair.before(), stat, node)?, pair.before().xattrs(node)?);
            object.insert("before".into(), side(stat, target, &xattrs));
        }
        if let Some((stat, node)) = now.as_ref().zip(change.now.as_ref()) {
            let (target, xattrs) = (target(pair.now(), stat, node)?, pair.now().xattrs(node)?);
            object.insert("now".into(), side(stat, target, &xattrs));
        }
        Ok(object.into())
    }
}

fn stats<P: Pair>(pair: &mut P, change: &Change<Node<P>>) -> Result<(Option<Stat>, Option<Stat>)> {
    let before = change.before.as_ref().map(|node| pair.before().stat(node)).transpose()?;
    let now = change.now.as_ref().map(|node| pair.now().stat(node)).transpose()?;
    Ok((before, now))
}

fn target<T: Tree>(tree: &mut T, stat: &Stat, node: &T::Node) -> Result<Option<Vec<u8>>> {
    (stat.kind == Kind::Symlink).then(|| tree.target(node)).transpose()
}

/// One difference, with what it was and is where that is short.
fn difference(what: What, before: &Stat, now: &Stat) -> String {
    let owner = |stat: &Stat| format!("{}:{}", stat.user, stat.group);
    match what {
        What::Type => format!("{} -> {}", before.kind.name(), now.kind.name()),
        What::Mode => format!("mode {:04o} -> {:04o}", before.mode, now.mode),
        What::Owner => format!("owner {} -> {}", owner(before), owner(now)),
        _ => what.name().to_owned(),
    }
}

/// What is said of one state of it.
fn side(stat: &Stat, target: Option<Vec<u8>>, xattrs: &Xattrs) -> Value {
    let mut object = Map::new();
    object.insert("type".into(), stat.kind.name().into());
    object.insert("mode".into(), format!("{:04o}", stat.mode).into());
    object.insert("uid".into(), stat.user.into());
    object.insert("gid".into(), stat.group.into());
    if stat.kind == Kind::File {
        object.insert("size".into(), stat.size.into());
    }
    if stat.kind != Kind::Directory {
        object.insert("links".into(), stat.links.into());
    }
    let mtime = format!("{}.{:09}", stat.mtime.seconds, stat.mtime.nanoseconds);
    object.insert("mtime".into(), mtime.into());
    if let Some(target) = target {
        put_bytes(&mut object, "target", &target);
    }
    if let Some((major, minor)) = stat.device {
        object.insert("device".into(), json!([major, minor]));
    }
    if !xattrs.is_empty() {
        let named = |(name, value): (&Vec<u8>, &Vec<u8>)| {
            (String::from_utf8_lossy(name).into_owned(), hex(value).into())
        };
        object.insert("xattrs".into(), xattrs.iter().map(named).collect::<Map<_, _>>().into());
    }
    object.into()
}

fn put_path(object: &mut Map<String, Value>, key: &str, path: &[u8]) {
    put_bytes(object, key, &[b"/", path].concat());
}

/// Text as it is. What is no text is given byte by byte as well, since JSON cannot hold it.
fn put_bytes(object: &mut Map<String, Value>, key: &str, bytes: &[u8]) {
    object.insert(key.into(), String::from_utf8_lossy(bytes).into());
    if std::str::from_utf8(bytes).is_err() {
        object.insert(format!("{key}_hex"), hex(bytes).into());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A path from `/` on.
pub(super) fn shown_path(path: &[u8]) -> String {
    quoted("/", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_cannot_hold_is_given_byte_by_byte() {
        let mut object = Map::new();
        put_path(&mut object, "path", b"a\xff");
        put_path(&mut object, "from", b"b");
        assert_eq!(Value::from(object), json!({ "path": "/a\u{fffd}", "path_hex": "2f61ff", "from": "/b" }));
    }
}
