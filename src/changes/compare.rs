//! The comparison: both trees at once, by names, in order.
//!
//! What cannot have changed is not looked at, and a directory in which nothing was written is read once. Directories are
//! gone through without recursion, and what is held at a time is bounded: who made the trees may want this to fail.

use super::tree::{Kind, Name, Stat, Time, Tree};
use crate::error::{Error, ErrorKind, Result};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::ops::Range;

/// The longest path that is told of, in bytes: no program can say a longer one (`PATH_MAX`).
pub const LONGEST_PATH: usize = 4096;

/// The most changes that there may be, and the most names of one kind that are kept at a time.
const MOST: usize = 4_000_000;

/// Bytes that are compared at a time.
const AT_ONCE: usize = 256 << 10;

/// Two states of one tree.
pub trait Pair {
    /// What both are.
    type Tree: Tree;

    /// What it was.
    fn before(&mut self) -> &mut Self::Tree;

    /// What it is.
    fn now(&mut self) -> &mut Self::Tree;

    /// Whether the two are known to be the same in all that is compared but their names: what is said of them, what they
    /// hold, of a directory its names and what these lead to.
    ///
    /// # Errors
    /// They cannot be read, or make no sense.
    fn untouched(&mut self, before: &Node<Self>, now: &Node<Self>) -> Result<bool>;

    /// Whether two regular files hold the same.
    ///
    /// # Errors
    /// They cannot be read.
    fn same_content(&mut self, before: &Node<Self>, now: &Node<Self>) -> Result<bool>;
}

/// What a name leads to.
pub type Node<P> = <<P as Pair>::Tree as Tree>::Node;

/// What may differ between two things of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It is something of another kind.
    Type,
    /// What a file holds, where a link leads to, which device it is.
    Content,
    /// Who may what.
    Mode,
    /// User or group.
    Owner,
    /// Extended attributes, access control lists among them.
    Xattrs,
    /// Which names lead to the same file.
    Links,
    /// When its content was last changed.
    Mtime,
}

impl What {
    /// All there are, in the order in which they are said.
    pub const ALL: [Self; 7] =
        [Self::Type, Self::Content, Self::Mode, Self::Owner, Self::Xattrs, Self::Links, Self::Mtime];

    /// Its name in JSON and for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::Content => "content",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Xattrs => "xattrs",
            Self::Links => "links",
            Self::Mtime => "mtime",
        }
    }
}

/// A set of differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Differences(u8);

impl Differences {
    /// Whether `what` is one of them.
    #[must_use]
    pub fn has(self, what: What) -> bool {
        self.0 & 1 << what as u8 != 0
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = What> {
        What::ALL.into_iter().filter(move |&what| self.has(what))
    }

    /// Whether there are none but `mtime`.
    #[must_use]
    pub fn is_noise(self) -> bool {
        self.0 & !(1 << What::Mtime as u8) == 0
    }

    fn add(&mut self, what: What, differs: bool) {
        if differs {
            self.0 |= 1 << what as u8;
        }
    }
}

/// Something that the session made, changed or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change<N> {
    /// From the root on, without a slash before it: of the root itself it is empty.
    pub path: Box<[u8]>,
    /// What it was; `None` if it was not there.
    pub before: Option<N>,
    /// What it is; `None` if it is there no more.
    pub now: Option<N>,
    /// How the two differ, if it is and was there.
    pub what: Differences,
    /// Another name that leads to the same file, the first of all. For what is new, or is a name of another file now.
    pub link: Option<Box<[u8]>>,
    /// The name under which it was there before, of something that was renamed. That name is deleted.
    pub from: Option<Box<[u8]>>,
}

impl<N> Change<N> {
    /// Whether a time is all in which it differs.
    #[must_use]
    pub fn is_noise(&self) -> bool {
        self.before.is_some() && self.now.is_some() && self.what.is_noise()
    }
}

/// All that has changed.
#[derive(Clone, Debug)]
pub struct Changes<N> {
    /// In the order of a walk: a directory before what is in it, names by their bytes.
    pub list: Vec<Change<N>>,
    /// Names of files that have several, in order, by file.
    pub links: Vec<Vec<Box<[u8]>>>,
    /// Directories that were not looked into, because no program could name what is in them.
    pub too_deep: u64,
}

/// Compares the two.
///
/// # Errors
/// One of them cannot be read, makes no sense, or has more than is held here.
pub fn compare<P: Pair>(pair: &mut P) -> Result<Changes<Node<P>>> {
    let mut walk = Walk::new();
    let roots = (pair.before().root()?, pair.now().root()?);
    walk.stack.push(Item { parent: 0, name: Name::default(), before: Some(roots.0), now: Some(roots.1) });
    while let Some(item) = walk.stack.pop() {
        walk.visit(pair, item)?;
    }
    walk.finish()
}

/// A name that is to be looked at.
struct Item<N> {
    /// How much of the path before it is its directory's.
    parent: usize,
    name: Name,
    before: Option<N>,
    now: Option<N>,
}

/// Files of several names by their numbers, with those names.
#[derive(Default)]
struct Links {
    names: HashMap<u64, Vec<Box<[u8]>>>,
    count: usize,
}

impl Links {
    fn remember(&mut self, stat: &Stat, path: &[u8]) -> Result<()> {
        if stat.links > 1 && stat.kind != Kind::Directory {
            self.names.entry(stat.number).or_default().push(path.into());
            self.count += 1;
        }
        bounded(self.count)
    }

    /// Of the names of a file that are in `both` trees, the first; by all others of them.
    fn first_of<N>(&self, both: &HashMap<Box<[u8]>, N>) -> HashMap<&[u8], &[u8]> {
        let mut first_of = HashMap::new();
        for names in self.names.values() {
            let mut names = names.iter().map(|name| &**name).filter(|name| both.contains_key(*name));
            if let Some(first) = names.next() {
                first_of.extend(names.map(|name| (name, first)));
            }
        }
        first_of
    }
}

/// Which thing it is, over renames: its number, and when it was made.
type Identity = (u64, Time);

struct Walk<N> {
    stack: Vec<Item<N>>,
    path: Vec<u8>,
    list: Vec<Change<N>>,
    links_before: Links,
    links_now: Links,
    /// Names that both trees have of files that have several names in either.
    linked: HashMap<Box<[u8]>, (N, N)>,
    /// What was found out of files of several names.
    known: HashMap<(N, N), Differences>,
    /// What is in the list as deleted and as added, and where.
    gone: HashMap<Identity, (Kind, usize)>,
    came: Vec<(Identity, Kind, usize)>,
    /// Directories that were gone into: none has two names.
    entered_before: HashSet<N>,
    entered_now: HashSet<N>,
    too_deep: u64,
}

impl<N: Clone + Eq + Hash> Walk<N> {
    fn new() -> Self {
        Self {
            stack: Vec::new(),
            path: Vec::new(),
            list: Vec::new(),
            links_before: Links::default(),
            links_now: Links::default(),
            linked: HashMap::new(),
            known: HashMap::new(),
            gone: HashMap::new(),
            came: Vec::new(),
            entered_before: HashSet::new(),
            entered_now: HashSet::new(),
            too_deep: 0,
        }
    }

    fn visit<P>(&mut self, pair: &mut P, item: Item<N>) -> Result<()>
    where
        P: Pair<Tree: Tree<Node = N>>,
    {
        self.path.truncate(item.parent);
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&item.name);
        if self.path.len() > LONGEST_PATH {
            self.too_deep += 1;
            return Ok(());
        }
        match (item.before, item.now) {
            (Some(before), Some(now)) => self.both(pair, before, now),
            (Some(before), None) => self.deleted(pair, before),
            (None, Some(now)) => self.added(pair, now),
            (None, None) => Ok(()),
        }
    }

    fn deleted<P>(&mut self, pair: &mut P, node: N) -> Result<()>
    where
        P: Pair<Tree: Tree<Node = N>>,
    {
        let stat = pair.before().stat(&node)?;
        if let Some(born) = stat.born {
            self.gone.insert((stat.number, born), (stat.kind, self.list.len()));
        }
        if stat.kind == Kind::Directory {
            self.enter(true, &node)?;
            let entries = pair.before().entries(&node)?;
            self.push_all(entries, |node| (Some(node), None))?;
        } else {
            self.links_before.remember(&stat, &self.path)?;
        }
        self.say(Some(node), None, Differences::default())
    }

    fn added<P>(&mut self, pair: &mut P, node: N) -> Result<()>
    where
        P: Pair<Tree: Tree<Node = N>>,
    {
        let stat = pair.now().stat(&node)?;
        if let Some(born) = stat.born {
            self.came.push(((stat.number, born), stat.kind, self.list.len()));
        }
        if stat.kind == Kind::Directory {
            self.enter(false, &node)?;
            let entries = pair.now().entries(&node)?;
            self.push_all(entries, |node| (None, Some(node)))?;
        } else {
            self.links_now.remember(&stat, &self.path)?;
        }
        self.say(None, Some(node), Differences::default())
    }

    fn both<P>(&mut self, pair: &mut P, before: N, now: N) -> Result<()>
    where
        P: Pair<Tree: Tree<Node = N>>,
    {
        let (old, new) = (pair.before().stat(&before)?, pair.now().stat(&now)?);
        let several = new.kind != Kind::Directory && new.links > 1;
        let key = (before.clone(), now.clone());
        if !(several && self.known.contains_key(&key)) && pair.untouched(&before, &now)? {
            if new.kind == Kind::Directory {
                self.enter(true, &before)?;
                self.enter(false, &now)?;
                let entries = pair.now().entries(&now)?;
                return self.push_all(entries, |node| (Some(node.clone()), Some(node)));
            }
            if several {
                self.known.insert(key, Differences::default());
            }
            return self.remember_both((before, &old), (now, &new));
        }
        let what = self.differences(pair, (&before, &old), (&now, &new))?;
        match (old.kind, new.kind) {
            (Kind::Directory, Kind::Directory) => {
                self.enter(true, &before)?;
                self.enter(false, &now)?;
                let entries = merge(pair.before().entries(&before)?, pair.now().entries(&now)?);
                self.push_items(entries)?;
            }
            (Kind::Directory, _) => {
                self.enter(true, &before)?;
                let entries = pair.before().entries(&before)?;
                self.push_all(entries, |node| (Some(node), None))?;
                self.links_now.remember(&new, &self.path)?;
            }
            (_, Kind::Directory) => {
                self.enter(false, &now)?;
                let entries = pair.now().entries(&now)?;
                self.push_all(entries, |node| (None, Some(node)))?;
                self.links_before.remember(&old, &self.path)?;
            }
            _ => self.remember_both((before.clone(), &old), (now.clone(), &new))?,
        }
        if what != Differences::default() {
            self.say(Some(before), Some(now), what)?;
        }
        Ok(())
    }

    fn differences<P>(&mut self, pair: &mut P, before: (&N, &Stat), now: (&N, &Stat)) -> Result<Differences>
    where
        P: Pair<Tree: Tree<Node = N>>,
    {
        let ((before, old), (now, new)) = (before, now);
        let key = (before.clone(), now.clone());
        if let Some(&known) = self.known.get(&key) {
            return Ok(known);
        }
        let mut what = Differences::default();
        what.add(What::Type, old.kind != new.kind);
        what.add(What::Mode, old.mode != new.mode);
        what.add(What::Owner, (old.user, old.group) != (new.user, new.group));
        what.add(What::Mtime, old.mtime != new.mtime);
        what.add(What::Xattrs, pair.before().xattrs(before)? != pair.now().xattrs(now)?);
        if old.kind == new.kind {
            let differs = match new.kind {
                Kind::File => old.size != new.size || !pair.same_content(before, now)?,
                Kind::Symlink => pair.before().target(before)? != pair.now().target(now)?,
                _ => old.device != new.device,
            };
            what.add(What::Content, differs);
        }
        if new.kind != Kind::Directory && new.links > 1 {
            self.known.insert(key, what);
            bounded(self.known.len())?;
        }
        Ok(what)
    }

    fn enter(&mut self, is_before: bool, node: &N) -> Result<()> {
        let entered = if is_before { &mut self.entered_before } else { &mut self.entered_now };
        if entered.insert(node.clone()) {
            return Ok(());
        }
        let whose = if is_before { "the base" } else { "the session" };
        let message = format!("The file system of {whose} is damaged: a directory is in several places");
        Err(Error::new(ErrorKind::Invalid, message).advise("check a copy of it with e2fsck"))
    }

    fn remember_both(&mut self, before: (N, &Stat), now: (N, &Stat)) -> Result<()> {
        self.links_before.remember(before.1, &self.path)?;
        self.links_now.remember(now.1, &self.path)?;
        if before.1.links > 1 || now.1.links > 1 {
            self.linked.insert(self.path.as_slice().into(), (before.0, now.0));
        }
        bounded(self.linked.len())
    }

    fn push_all(
        &mut self,
        entries: Vec<(Name, N)>,
        sides: impl Fn(N) -> (Option<N>, Option<N>),
    ) -> Result<()> {
        self.push_items(
            entries
                .into_iter()
                .map(|(name, node)| {
                    let (before, now) = sides(node);
                    (name, before, now)
                })
                .collect(),
        )
    }

    /// What is on the top is looked at next: the first.
    fn push_items(&mut self, entries: Vec<(Name, Option<N>, Option<N>)>) -> Result<()> {
        let parent = self.path.len();
        let items = entries.into_iter().rev();
        self.stack.extend(items.map(|(name, before, now)| Item { parent, name, before, now }));
        bounded(self.stack.len())
    }

    fn say(&mut self, before: Option<N>, now: Option<N>, what: Differences) -> Result<()> {
        let path = self.path.as_slice().into();
        self.list.push(Change { path, before, now, what, link: None, from: None });
        bounded(self.list.len())
    }

    fn finish(mut self) -> Result<Changes<N>> {
        self.find_renamed();
        self.find_regrouped()?;
        let mut links: Vec<_> = self.links_now.names.into_values().filter(|names| names.len() > 1).collect();
        links.sort_unstable();
        let others = links.iter().flat_map(|names| names[1..].iter().map(|name| (name, &names[0])));
        let first_of: HashMap<_, _> = others.collect();
        for change in &mut self.list {
            if change.before.is_none() || change.what.has(What::Links) {
                change.link = first_of.get(&change.path).map(|&first| first.clone());
            }
        }
        Ok(Changes { list: self.list, links, too_deep: self.too_deep })
    }

    /// What went under one name and came under another is the same thing.
    fn find_renamed(&mut self) {
        for (identity, kind, to) in std::mem::take(&mut self.came) {
            if let Some(&(was, from)) = self.gone.get(&identity)
                && was == kind
            {
                self.gone.remove(&identity);
                self.list[to].from = Some(self.list[from].path.clone());
            }
        }
    }

    /// Names that lead to the same file as another does, and did not before; and the other way round.
    fn find_regrouped(&mut self) -> Result<()> {
        let (before, now) = (self.links_before.first_of(&self.linked), self.links_now.first_of(&self.linked));
        let names = self.linked.keys().map(|name| &**name);
        let mut regrouped: HashSet<&[u8]> = names.filter(|name| before.get(name) != now.get(name)).collect();
        for change in &mut self.list {
            let differs = regrouped.remove(&*change.path);
            change.what.add(What::Links, differs);
        }
        if regrouped.is_empty() {
            return Ok(());
        }
        // Nothing else of these has changed.
        let mut what = Differences::default();
        what.add(What::Links, true);
        for name in regrouped {
            let (before, now) = &self.linked[name];
            let (before, now) = (Some(before.clone()), Some(now.clone()));
            self.list.push(Change { path: name.into(), before, now, what, link: None, from: None });
        }
        // As the walk has them: what is in a directory before what has a longer name than it.
        self.list.sort_by(|one, other| in_order(&one.path).cmp(in_order(&other.path)));
        bounded(self.list.len())
    }
}

/// What paths are sorted by to come in the order of a walk.
pub(super) fn in_order(path: &[u8]) -> impl Iterator<Item = u8> {
    path.iter().map(|&byte| if byte == b'/' { 0 } else { byte })
}

fn bounded(count: usize) -> Result<()> {
    if count <= MOST {
        return Ok(());
    }
    let message = format!("More than {MOST} names would have to be held at a time");
    Err(Error::new(ErrorKind::OutOfSpace, message).advise("compare the trees by other means, such as rsync"))
}

/// The names of two directories, each of which is in order.
fn merge<N>(before: Vec<(Name, N)>, now: Vec<(Name, N)>) -> Vec<(Name, Option<N>, Option<N>)> {
    let mut merged = Vec::with_capacity(before.len().max(now.len()));
    let (mut before, mut now) = (before.into_iter().peekable(), now.into_iter().peekable());
    loop {
        let order = match (before.peek(), now.peek()) {
            (Some((one, _)), Some((other, _))) => one.cmp(other),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (None, None) => return merged,
        };
        let old = if order.is_le() { before.next() } else { None };
        let new = if order.is_ge() { now.next() } else { None };
        match (old, new) {
            (Some((name, old)), new) => merged.push((name, Some(old), new.map(|(_, new)| new))),
            (None, Some((name, new))) => merged.push((name, None, Some(new))),
            (None, None) => return merged,
        }
    }
}

/// Whether two files of `size` bytes hold the same, by reading what of either is data.
///
/// # Errors
/// They cannot be read.
pub(super) fn same_bytes<P: Pair + ?Sized>(
    pair: &mut P,
    before: &Node<P>,
    now: &Node<P>,
    size: u64,
) -> Result<bool> {
    let ranges = union(pair.before().data(before)?, pair.now().data(now)?);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for range in ranges {
        let mut at = range.start;
        let end = range.end.min(size);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(AT_ONCE);
            old.resize(length, 0);
            new.resize(length, 0);
            pair.before().read(before, at, &mut old)?;
            pair.now().read(now, at, &mut new)?;
            if old != new {
                return Ok(false);
            }
            at += length as u64;
        }
    }
    Ok(true)
}

/// What is in either of two lists of ranges.
fn union(one: Vec<Range<u64>>, other: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all = [one, other].concat();
    all.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
