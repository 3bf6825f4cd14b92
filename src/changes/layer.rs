//! What has changed as a layer of an OCI image: an archive (POSIX.1-2001, "pax") of what is new or differs, with marks for
//! what is gone, that is put over the base and gives what the session has.
//!
//! ```text
//!   a/.wh.name, a/.wh..wh..opq    gone: a name, or all that the directory had
//!   a/, a/file, a/link            in the order of a walk
//! ```
//!
//! With everything come the directories that it is in, changed or not: who replaces a file in one touches it, and has to set
//! it right.
//!
//! A file of several names comes once, and then as links to that, all its names with it: only so are they the same file
//! wherever the layer is put. Names, targets and attributes are bytes, and come as they are.

use super::compare::{Change, Changes, Node, Pair};
use super::tree::{Kind, Stat, Time, Tree, Xattrs};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use tar::{Builder, EntryType, Header};

/// What marks a name that is gone.
const GONE: &[u8] = b".wh.";
/// What marks a directory of whose old content nothing is left.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A file with as many zeroes as this in holes is written as a sparse one. Below that it is not: not all who read layers
/// know that, and zeroes compress well.
const SPARSE: u64 = 64 << 20;

/// Bytes of a file that are read at a time.
const AT_ONCE: usize = 1 << 20;

/// The largest number in seven octal digits, and in eleven.
const SEVEN: u64 = 0o777_7777;
const ELEVEN: u64 = 0o777_7777_7777;
/// Bytes of a name and of a link's target in a header.
const NAME: usize = 100;

/// What a layer cannot hold, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// From the root on, without a slash before it.
    pub path: Box<[u8]>,
    /// Why: what it is or has.
    pub why: &'static str,
    /// Whether nobody will miss it.
    pub harmless: bool,
}

/// Writes what has changed to `out`; says what could not be written.
///
/// # Errors
/// The session's files cannot be read, or `out` cannot be written.
pub fn write<P: Pair>(pair: &mut P, changes: &Changes<Node<P>>, out: impl Write) -> Result<Vec<LeftOut>> {
    let mut layer = Layer { archive: Builder::new(out), left_out: Vec::new() };
    for path in whiteouts(pair, changes, &mut layer.left_out)? {
        layer.mark(&path)?;
    }
    for (InOrder(path), entry) in entries(pair, changes, &mut layer.left_out)? {
        match entry {
            Entry::Whole(node) => layer.add(pair.now(), &path, &node, None)?,
            Entry::Link(node, to) => layer.add(pair.now(), &path, &node, Some(&to))?,
        }
    }
    let mut out = layer.archive.into_inner().map_err(failed)?;
    out.flush().map_err(failed)?;
    Ok(layer.left_out)
}

fn failed(error: io::Error) -> Error {
    Error::io("Cannot write the layer", error)
}

/// Whether the name of something is one by which layers mean something else; and so of all that is in it.
fn is_reserved(path: &[u8]) -> bool {
    path.split(|&byte| byte == b'/').any(|name| name.starts_with(GONE))
}

/// Marks for what is gone, of a directory as a whole the one that does for all.
fn whiteouts<P: Pair>(
    pair: &mut P,
    changes: &Changes<Node<P>>,
    left_out: &mut Vec<LeftOut>,
) -> Result<Vec<Vec<u8>>> {
    // By directory: what is gone from it.
    let mut gone: BTreeMap<InOrder, Vec<&[u8]>> = BTreeMap::new();
    // What was a directory, and whose content goes with it.
    let mut with: Option<&[u8]> = None;
    for change in &changes.list {
        let path = &*change.path;
        let below = |with: &[u8]| path.strip_prefix(with).is_some_and(|rest| rest.first() == Some(&b'/'));
        if with.is_some_and(below) || change.before.is_none() {
            continue;
        }
        let was_directory = is_directory(pair.before(), change.before.as_ref())?;
        if was_directory && !is_directory(pair.now(), change.now.as_ref())? {
            with = Some(path);
        }
        if change.now.is_none() {
            let (directory, name) = split(path);
            gone.entry(InOrder(directory.into())).or_default().push(name);
        }
    }
    let directories = changes.list.iter().filter(|change| gone.contains_key(&InOrder(change.path.clone())));
    let directories: HashMap<&[u8], &Change<_>> = directories.map(|change| (&*change.path, change)).collect();
    let mut marks = Vec::new();
    for (InOrder(directory), names) in &gone {
        let had = directories.get(&**directory).and_then(|change| change.before.as_ref());
        let had = had.map(|node| pair.before().entries(node)).transpose()?;
        if names.len() > 1 && had.is_some_and(|had| had.len() == names.len()) && !is_reserved(directory) {
            marks.push(join(directory, OPAQUE));
            continue;
        }
        for name in names {
            if is_reserved(directory) || is_reserved(name) {
                let why = "deleted, and its name is one that layers use themselves";
                left_out.push(LeftOut { path: join(directory, name).into(), why, harmless: false });
            } else {
                marks.push(join(directory, &[GONE, name].concat()));
            }
        }
    }
    Ok(marks)
}

fn is_directory<T: Tree>(tree: &mut T, node: Option<&T::Node>) -> Result<bool> {
    node.map_or(Ok(false), |node| Ok(tree.stat(node)?.kind == Kind::Directory))
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// What comes into the layer under a path.
enum Entry<N> {
    Whole(N),
    /// A link to what comes under another path.
    Link(N, Box<[u8]>),
}

/// A path in the order of a walk: what is in a directory before what has a longer name than it.
#[derive(PartialEq, Eq)]
struct InOrder(Box<[u8]>);

impl Ord for InOrder {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        super::compare::in_order(&self.0).cmp(super::compare::in_order(&other.0))
    }
}

impl PartialOrd for InOrder {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

fn entries<P: Pair>(
    pair: &mut P,
    changes: &Changes<Node<P>>,
    left_out: &mut Vec<LeftOut>,
) -> Result<BTreeMap<InOrder, Entry<Node<P>>>> {
    let mut group_of: HashMap<&[u8], &[Box<[u8]>]> = HashMap::new();
    for names in &changes.links {
        group_of.extend(names.iter().map(|name| (&**name, &**names)));
    }
    let mut entries = BTreeMap::new();
    for change in &changes.list {
        let Some(node) = &change.now else { continue };
        let mut leave_out =
            |why, harmless| left_out.push(LeftOut { path: change.path.clone(), why, harmless });
        if is_reserved(&change.path) {
            leave_out("its name is one that layers use themselves", false);
            continue;
        }
        if pair.now().stat(node)?.kind == Kind::Socket {
            leave_out("a socket", true);
            continue;
        }
        match group_of.get(&*change.path) {
            None => {
                entries.insert(InOrder(change.path.clone()), Entry::Whole(node.clone()));
            }
            Some(names) => {
                let mut names = names.iter().filter(|name| !is_reserved(name));
                let first = names.next();
                for name in names {
                    let to = first.unwrap_or(name).clone();
                    entries.insert(InOrder(name.clone()), Entry::Link(node.clone(), to));
                }
                if let Some(first) = first {
                    entries.insert(InOrder(first.clone()), Entry::Whole(node.clone()));
                }
            }
        }
    }
    add_directories(pair.now(), &mut entries)?;
    Ok(entries)
}

/// Adds the directories in which everything else is.
fn add_directories<T: Tree>(tree: &mut T, entries: &mut BTreeMap<InOrder, Entry<T::Node>>) -> Result<()> {
    let mut known = HashMap::from([(Box::default(), tree.root()?)]);
    let directories: BTreeSet<Vec<u8>> = entries.keys().flat_map(|InOrder(path)| above(path)).collect();
    // One comes before what is in it.
    for path in directories {
        let (directory, name) = split(&path);
        if !known.contains_key(&*path)
            && let Some(above) = known.get(directory)
        {
            let entries = tree.entries(above)?;
            if let Ok(at) = entries.binary_search_by(|(other, _)| (**other).cmp(name)) {
                known.insert(path.as_slice().into(), entries[at].1.clone());
            }
        }
        let path = path.into_boxed_slice();
        if let Some(node) = known.get(&path).cloned() {
            entries.entry(InOrder(path)).or_insert(Entry::Whole(node));
        }
    }
    Ok(())
}

/// The directories that a path leads through.
fn above(path: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let root = (!path.is_empty()).then_some(0);
    root.into_iter().chain(slashes).map(|end| path[..end].to_vec())
}

struct Layer<W: Write> {
    archive: Builder<W>,
    left_out: Vec<LeftOut>,
}

impl<W: Write> Layer<W> {
    /// Adds a mark: an empty file.
    fn mark(&mut self, path: &[u8]) -> Result<()> {
        let mut records = Vec::new();
        let mut header = header(EntryType::Regular, path, &mut records);
        header.set_mode(0o644);
        self.append(header, records, io::empty())
    }

    fn add<T: Tree>(&mut self, tree: &mut T, path: &[u8], node: &T::Node, link: Option<&[u8]>) -> Result<()> {
        let stat = tree.stat(node)?;
        let kind = match stat.kind {
            _ if link.is_some() => EntryType::Link,
            Kind::File => EntryType::Regular,
            Kind::Directory => EntryType::Directory,
            Kind::Symlink => EntryType::Symlink,
            Kind::Block => EntryType::Block,
            Kind::Character => EntryType::Char,
            // Sockets were left out.
            Kind::Fifo | Kind::Socket => EntryType::Fifo,
        };
        let shown = match stat.kind {
            Kind::Directory if path.is_empty() => b"./".to_vec(),
            Kind::Directory => [path, b"/"].concat(),
            _ => path.to_vec(),
        };
        let mut records = Vec::new();
        let mut header = header(kind, &shown, &mut records);
        describe(&mut header, &stat, &mut records);
        match (link, stat.kind) {
            (Some(to), _) => put_target(&mut header, to, &mut records),
            (None, Kind::Symlink) => put_target(&mut header, &tree.target(node)?, &mut records),
            _ => {}
        }
        if link.is_none() {
            self.put_xattrs(path, tree.xattrs(node)?, &mut records);
        }
        if stat.kind != Kind::File || link.is_some() {
            return self.append(header, records, io::empty());
        }
        let data = tree.data(node)?;
        let held: u64 = data.iter().map(|range| range.end - range.start).sum();
        if stat.size - held >= SPARSE {
            return self.add_sparse(tree, path, node, &stat, data, (header, records));
        }
        put_size(&mut header, stat.size, &mut records);
        let mut content = Content::new(tree, node, data, 0..stat.size);
        let appended = self.append(header, records, &mut content);
        content.failed.map_or(appended, Err)
    }

    /// As GNU tar writes sparse files in this format since 1.15.92: the file's own size and name beside it, and where its
    /// data belongs before its data.
    fn add_sparse<T: Tree>(
        &mut self,
        tree: &mut T,
        path: &[u8],
        node: &T::Node,
        stat: &Stat,
        mut data: Vec<Range<u64>>,
        (mut header, mut records): (Header, Records),
    ) -> Result<()> {
        // Without this, what is behind the last data would be missing.
        if data.last().is_none_or(|last| last.end < stat.size) {
            data.push(stat.size..stat.size);
        }
        let mut map = format!("{}\n", data.len());
        for range in &data {
            use std::fmt::Write as _;
            // Writing to a String does not fail.
            let _ = write!(map, "{}\n{}\n", range.start, range.end - range.start);
        }
        let padded = map.len().next_multiple_of(512);
        map.extend(std::iter::repeat_n('\0', padded - map.len()));
        records.retain(|(key, _)| key != "path");
        let mut record =
            |key: &str, value: &[u8]| records.push((format!("GNU.sparse.{key}"), value.to_vec()));
        record("major", b"1");
        record("minor", b"0");
        record("name", path);
        record("realsize", stat.size.to_string().as_bytes());
        put_name(&mut header, &join(b"GNUSparseFile.0", split(path).1));
        let held: u64 = data.iter().map(|range| range.end - range.start).sum();
        put_size(&mut header, map.len() as u64 + held, &mut records);
        let mut failed = None;
        let parts = data.into_iter().filter(|range| !range.is_empty());
        let mut parts = parts.collect::<Vec<_>>().into_iter();
        let mut now: Option<Range<u64>> = None;
        let reader = FromFn(|buffer: &mut [u8]| {
            if now.as_ref().is_none_or(Range::is_empty) {
                now = parts.next();
            }
            let Some(range) = &mut now else { return Ok(0) };
            let length = (buffer.len() as u64).min(range.end - range.start);
            let length = usize::try_from(length).unwrap_or(buffer.len());
            if let Err(error) = tree.read(node, range.start, &mut buffer[..length]) {
                failed = Some(error);
                return Err(io::ErrorKind::Other.into());
            }
            range.start += length as u64;
            Ok(length)
        });
        let appended = self.append(header, records, map.as_bytes().chain(reader));
        failed.map_or(appended, Err)
    }

    fn put_xattrs(&mut self, path: &[u8], xattrs: Xattrs, records: &mut Records) {
        for (name, value) in xattrs {
            match String::from_utf8(name) {
                Ok(name) if !name.contains('=') => records.push((format!("SCHILY.xattr.{name}"), value)),
                _ => self.left_out.push(LeftOut {
                    path: path.into(),
                    why: "an attribute whose name archives cannot hold",
                    harmless: false,
                }),
            }
        }
    }

    fn append(&mut self, mut header: Header, records: Records, content: impl Read) -> Result<()> {
        let records = records.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        self.archive.append_pax_extensions(records).map_err(failed)?;
        header.set_cksum();
        self.archive.append(&header, BufReader::with_capacity(AT_ONCE, content)).map_err(failed)
    }
}

/// What does not fit into a header, by its name.
type Records = Vec<(String, Vec<u8>)>;

fn header(kind: EntryType, path: &[u8], records: &mut Records) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    if put_name(&mut header, path) {
        records.push(("path".into(), path.to_vec()));
    }
    header
}

/// Whether it does not fit, or is not to be understood without more.
fn put_name(header: &mut Header, path: &[u8]) -> bool {
    put(&mut header.as_old_mut().name, path)
}

fn put_target(header: &mut Header, target: &[u8], records: &mut Records) {
    if put(&mut header.as_old_mut().linkname, target) {
        records.push(("linkpath".into(), target.to_vec()));
    }
}

fn put(field: &mut [u8; NAME], bytes: &[u8]) -> bool {
    field.fill(0);
    let length = bytes.len().min(NAME);
    for (place, &byte) in field.iter_mut().zip(&bytes[..length]) {
        // For who cannot read the whole one.
        *place = if byte.is_ascii() { byte } else { b'_' };
    }
    bytes.len() > NAME || !bytes.is_ascii()
}

fn put_size(header: &mut Header, size: u64, records: &mut Records) {
    header.set_size(size);
    if size > ELEVEN {
        records.push(("size".into(), size.to_string().into_bytes()));
    }
}

/// Mode, owner, time, numbers of a device.
fn describe(header: &mut Header, stat: &Stat, records: &mut Records) {
    header.set_mode(stat.mode);
    for (key, id) in [("uid", stat.user), ("gid", stat.group)] {
        let id = u64::from(id);
        let in_header = if id <= SEVEN { id } else { 0 };
        match key {
            "uid" => header.set_uid(in_header),
            _ => header.set_gid(in_header),
        }
        if id > SEVEN {
            records.push((key.into(), id.to_string().into_bytes()));
        }
    }
    let Time { seconds, nanoseconds } = stat.mtime;
    let whole = u64::try_from(seconds).ok().filter(|&seconds| seconds <= ELEVEN);
    header.set_mtime(whole.unwrap_or(0));
    if whole.is_none() || nanoseconds != 0 {
        records.push(("mtime".into(), decimal(stat.mtime).into_bytes()));
    }
    if let Some((major, minor)) = stat.device {
        // Headers of this kind have these fields, and the kernel's numbers fit.
        let _ = header.set_device_major(major);
        let _ = header.set_device_minor(minor);
    }
}

/// Seconds, with what is behind the point.
fn decimal(time: Time) -> String {
    let nanoseconds = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanoseconds);
    let (sign, absolute) = (if nanoseconds < 0 { "-" } else { "" }, nanoseconds.unsigned_abs());
    let text = format!("{sign}{}.{:09}", absolute / 1_000_000_000, absolute % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// What a file holds, zeroes with it.
struct Content<'a, T: Tree> {
    tree: &'a mut T,
    node: &'a T::Node,
    data: std::iter::Peekable<std::vec::IntoIter<Range<u64>>>,
    left: Range<u64>,
    failed: Option<Error>,
}

impl<'a, T: Tree> Content<'a, T> {
    fn new(tree: &'a mut T, node: &'a T::Node, data: Vec<Range<u64>>, left: Range<u64>) -> Self {
        Self { tree, node, data: data.into_iter().peekable(), left, failed: None }
    }
}

impl<T: Tree> Read for Content<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let at = self.left.start;
        while self.data.next_if(|range| range.end <= at).is_some() {}
        // Until data begins, or ends.
        let (is_data, until) = match self.data.peek() {
            Some(range) if range.start <= at => (true, range.end),
            Some(range) => (false, range.start),
            None => (false, u64::MAX),
        };
        let length = (buffer.len() as u64).min(until.min(self.left.end) - at);
        let length = usize::try_from(length).unwrap_or(buffer.len());
        let part = &mut buffer[..length];
        if is_data && length > 0 {
            if let Err(error) = self.tree.read(self.node, at, part) {
                self.failed = Some(error);
                return Err(io::ErrorKind::Other.into());
            }
        } else {
            part.fill(0);
        }
        self.left.start += length as u64;
        Ok(length)
    }
}

/// A reader that a closure is.
struct FromFn<F>(F);

impl<F: FnMut(&mut [u8]) -> io::Result<usize>> Read for FromFn<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.0)(buffer)
    }
}
