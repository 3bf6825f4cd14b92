//! What has changed within text files, as a unified diff, which `patch -p1` takes.

use super::compare::{Change, Changes, Node, Pair};
use super::quote::quoted;
use super::tree::{Kind, Tree};
use crate::error::{Error, ErrorKind, Result};
use similar::TextDiff;
use std::io::{self, Write};
use std::time::Duration;

/// Files of more bytes than this are not compared by lines.
const LARGEST: u64 = 16 << 20;
/// Where a file is looked at to tell whether it is text: as git does.
const LOOKED_AT: usize = 8000;
/// How long the shortest difference of two files is looked for; then one is taken that is longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes how the files at and below `path` differ; it has no slash before or behind it.
///
/// # Errors
/// `NotFound` if there is nothing, nor was; a file cannot be read, or `out` cannot be written.
pub fn write<P: Pair>(
    pair: &mut P,
    changes: &Changes<Node<P>>,
    path: &[u8],
    out: &mut impl Write,
) -> Result<()> {
    let mut found = false;
    for change in &changes.list {
        let below = change.path.strip_prefix(path);
        let is_meant = below.is_some_and(|rest| path.is_empty() || rest.is_empty() || rest[0] == b'/');
        if is_meant {
            found = true;
            one(pair, change, out)?;
        }
    }
    if !found && !exists(pair.before(), path)? && !exists(pair.now(), path)? {
        let error = Error::new(ErrorKind::NotFound, "Neither the session nor its base has");
        return Err(error.on(quoted("/", path)));
    }
    Ok(())
}

fn exists<T: Tree>(tree: &mut T, path: &[u8]) -> Result<bool> {
    let mut node = tree.root()?;
    for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
        if tree.stat(&node)?.kind != Kind::Directory {
            return Ok(false);
        }
        let entries = tree.entries(&node)?;
        match entries.binary_search_by(|(other, _)| (**other).cmp(name)) {
            Ok(at) => node = entries[at].1.clone(),
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

/// One side of a change.
enum Content {
    /// It is not there.
    Nothing,
    Text(Vec<u8>),
    /// It has no lines: what it is.
    Other(String),
}

fn one<P: Pair>(pair: &mut P, change: &Change<Node<P>>, out: &mut impl Write) -> Result<()> {
    let before = content(pair.before(), change.before.as_ref())?;
    let now = content(pair.now(), change.now.as_ref())?;
    let (old, new) = (quoted("a/", &change.path), quoted("b/", &change.path));
    let written = match (&before, &now) {
        // What was or is a directory is told by what is in it.
        (Content::Nothing, Content::Nothing) => return Ok(()),
        (Content::Other(one), Content::Other(other)) if one == other => {
            writeln!(out, "{} {old} and {new} differ", plural(one))
        }
        (Content::Other(what), Content::Nothing) => writeln!(out, "Only before: {old} ({what})"),
        (Content::Nothing, Content::Other(what)) => writeln!(out, "Only now: {new} ({what})"),
        (Content::Other(one), Content::Other(other)) => {
            writeln!(out, "{old} was a {one}, and {new} is a {other}")
        }
        (Content::Other(what), Content::Text(_)) => writeln!(out, "{old} was a {what}, and {new} is text"),
        (Content::Text(_), Content::Other(what)) => writeln!(out, "{old} was text, and {new} is a {what}"),
        (Content::Nothing, Content::Text(text)) => lines(&[], text, "/dev/null", &new, out),
        (Content::Text(text), Content::Nothing) => lines(text, &[], &old, "/dev/null", out),
        // It differs in something else.
        (Content::Text(one), Content::Text(other)) if one == other => return Ok(()),
        (Content::Text(one), Content::Text(other)) => lines(one, other, &old, &new, out),
    };
    written.map_err(|error| Error::io("Cannot write the difference", error))
}

fn plural(what: &str) -> String {
    let mut text = what.to_owned();
    text[..1].make_ascii_uppercase();
    text + "s"
}

fn lines(before: &[u8], now: &[u8], old: &str, new: &str, out: &mut impl Write) -> io::Result<()> {
    // An empty file that comes or goes has no lines that could.
    if before.is_empty() && now.is_empty() {
        let (word, name) = if old == "/dev/null" { ("now", new) } else { ("before", old) };
        return writeln!(out, "Only {word}: {name} (empty file)");
    }
    let diff = TextDiff::configure().timeout(PATIENCE).diff_lines(before, now);
    // A name with a space in it ends where a tab is.
    let ended = |name: &str| if name.contains(' ') { format!("{name}\t") } else { name.to_owned() };
    diff.unified_diff().header(&ended(old), &ended(new)).to_writer(out)
}

fn content<T: Tree>(tree: &mut T, node: Option<&T::Node>) -> Result<Content> {
    let Some(node) = node else { return Ok(Content::Nothing) };
    let stat = tree.stat(node)?;
    match stat.kind {
        Kind::Directory => return Ok(Content::Nothing),
        Kind::Symlink => {
            let target = tree.target(node)?;
            return Ok(Content::Other(format!("symbolic link to {}", quoted("", &target))));
        }
        Kind::File if stat.size > LARGEST => return Ok(Content::Other("large file".to_owned())),
        Kind::File => {}
        kind => return Ok(Content::Other(kind.name().to_owned())),
    }
    let mut bytes = vec![0; usize::try_from(stat.size).unwrap_or(0)];
    tree.read(node, 0, &mut bytes)?;
    let is_text = !bytes[..bytes.len().min(LOOKED_AT)].contains(&0);
    Ok(if is_text { Content::Text(bytes) } else { Content::Other("binary file".to_owned()) })
}
