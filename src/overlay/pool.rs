//! The block memory of a server: carved from large chunks, handed out touched and zeroed, wiped when it comes back.
//!
//! ```text
//!  worker: Magazine (some free slots of its own) <-> Pool: chunks of 2 MiB  <- helper: touches chunks ahead of need,
//!            allocate, release: no lock               with a bit a slot        wipes what came back in bulk,
//!                                                                              gives idle chunks back to the system
//! ```
//!
//! The invariant: a slot that is marked free in a chunk is zeroed. Slots that came back in bulk wait, still dirty, for
//! the helper; whoever finds nothing else free wipes some of them instead of failing.

use super::account::Book;
use super::overflow::{Overflow, OverflowFile};
use super::{BlockSize, Budget, Outcome};
use crate::error::{Error, ErrorKind, Result};
use crate::seal::Keys;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::Arena;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

/// Bytes in a chunk: a huge page. For loom, which keeps an account of every slot, two blocks.
const CHUNK: u32 = if cfg!(loom) { 8 << 10 } else { 2 << 20 };
/// Bytes of slots that a magazine takes or gives at a time.
pub(super) const MAGAZINE: usize = if cfg!(loom) { 4 << 10 } else { 256 << 10 };
/// The most chunks that are kept ready ahead of need.
const MOST_RESERVE: u32 = 16;
/// Bytes of block memory beyond the budget, at least: for what is pinned within its margin, and for payloads on their way.
const SLACK: u64 = if cfg!(loom) { 8 << 10 } else { 2 * Budget::TOTAL_PINNED_MARGIN };
/// Bytes of dirty slots that are wiped in one go, without looking at anything else.
const WIPE_AT_ONCE: usize = 8 << 20;

/// Slots that payloads on their way are received into: in no session's budget, bounded for all together.
#[derive(Debug)]
pub struct Staging {
    slots: AtomicUsize,
    limit: usize,
}

impl Staging {
    /// Whether more may be taken ahead.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.slots.load(Ordering::Relaxed) < self.limit
    }

    /// Notes that slots were taken.
    pub fn add(&self, slots: usize) {
        self.slots.fetch_add(slots, Ordering::Relaxed);
    }

    /// Notes that slots were given back, or installed.
    pub fn remove(&self, slots: usize) {
        self.slots.fetch_sub(slots, Ordering::Relaxed);
    }
}

/// How long the helper waits for work before it looks what can be given back.
const TICK: Duration = Duration::from_millis(100);

/// The block memory of a server.
#[derive(Debug)]
pub struct Pool {
    pub(super) arena: Arena,
    staging: Staging,
    block_size: BlockSize,
    slots_per_chunk: u32,
    book: Book,
    keys: OnceLock<Keys>,
    overflow: Option<Overflow>,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Debug)]
struct State {
    /// Chunks that were in use so far.
    chunks: Vec<Chunk>,
    /// Those with free slots. Low numbers are used first, so that high ones fall free altogether.
    available: BTreeSet<u32>,
    /// Those that the system has back.
    absent: BTreeSet<u32>,
    /// Free slots in `available`.
    free: u64,
    /// Slots that came back and were not wiped yet.
    dirty: Vec<u32>,
    /// Whether the helper is wiping some more, which are in no list meanwhile.
    wiping: bool,
    /// Chunks to keep ready ahead of need: grows when need was faster, shrinks when there is none.
    reserve: u32,
    /// Slots handed out since the helper last looked.
    taken: u64,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Chunk {
    free: u32,
    bits: [u64; 8],
}

impl Chunk {
    fn put(&mut self, index: u32) {
        let (word, bit) = (index as usize / 64, 1 << (index % 64));
        debug_assert_eq!(self.bits[word] & bit, 0, "slot freed twice");
        self.bits[word] |= bit;
        self.free += 1;
    }

    fn take(&mut self) -> Option<u32> {
        let word = self.bits.iter().position(|&bits| bits != 0)?;
        let bit = self.bits[word].trailing_zeros();
        self.bits[word] &= self.bits[word] - 1;
        self.free -= 1;
        u32::try_from(word * 64).ok().map(|first| first + bit)
    }
}

impl Pool {
    /// A pool for at most `limit` bytes of blocks.
    ///
    /// # Errors
    /// When the address space for it cannot be had.
    pub fn new(limit: u64, block_size: BlockSize) -> Result<Arc<Self>> {
        Self::with_overflow(limit, block_size, None)
    }

    /// The same, with a file for blocks of sealed overlays that memory is short for.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_overflow(
        limit: u64,
        block_size: BlockSize,
        overflow: Option<OverflowFile>,
    ) -> Result<Arc<Self>> {
        // Blocks that lie in workers' magazines, receive a payload, or are pinned within the margin, are in nobody's
        // budget: room for them, so that a session within its budget finds a slot.
        let slack = limit / 32 + SLACK;
        let slots_per_chunk = CHUNK / u32::try_from(block_size.bytes()).unwrap_or(CHUNK);
        let chunks = limit.saturating_add(slack).div_ceil(u64::from(CHUNK));
        let slots = u32::try_from(chunks.saturating_mul(u64::from(slots_per_chunk))).unwrap_or(u32::MAX);
        let slots = slots - slots % slots_per_chunk;
        let overflow = overflow.map(|file| Overflow::new(file, block_size, slots));
        let places = overflow.as_ref().map_or(0, Overflow::places);
        let arena = Arena::reserve_with_places(slots, block_size.in_memory(), places).map_err(|error| {
            Error::io("Cannot reserve address space for --memory", error)
                .advise("give a smaller --memory, or raise ulimit -v")
        })?;
        let state = State {
            chunks: Vec::new(),
            available: BTreeSet::new(),
            absent: BTreeSet::new(),
            free: 0,
            dirty: Vec::new(),
            wiping: false,
            reserve: 1,
            taken: 0,
            stopping: false,
        };
        let staging = usize::try_from(SLACK / 2).unwrap_or(0) / block_size.in_memory();
        Ok(Arc::new(Self {
            arena,
            staging: Staging { slots: AtomicUsize::new(0), limit: staging },
            block_size,
            slots_per_chunk,
            book: Book::default(),
            keys: OnceLock::new(),
            overflow,
            state: Mutex::new(state),
            work: Condvar::new(),
        }))
    }

    /// The unit.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Keeps what is written out of swap.
    ///
    /// # Errors
    /// As [`std::io::ErrorKind::Unsupported`] before Linux 5.18; what the system says where locked memory is limited.
    pub fn lock_memory(&self) -> std::io::Result<()> {
        self.arena.lock()
    }

    /// Where blocks go that memory is short for.
    #[must_use]
    pub fn overflow(&self) -> Option<&Overflow> {
        self.overflow.as_ref()
    }

    /// Takes back the place of a block that nobody has any more, if that is where it was.
    pub(super) fn take_place(&self, number: u32) -> bool {
        let is_away = self.arena.is_away(number);
        if let (true, Some(overflow)) = (is_away, &self.overflow) {
            overflow.free(number);
        }
        is_away
    }

    /// Memory for the keys of sealed sessions. What is locked, and how much there is room for, is decided by who asks first.
    ///
    /// # Errors
    /// What the system says when the address space is limited.
    pub fn keys(&self) -> std::io::Result<&Keys> {
        if self.keys.get().is_none() {
            // Two who do this at once both reserve, and one of them for nothing.
            let _ = self.keys.set(Keys::reserve()?);
        }
        self.keys.get().ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
    }

    /// Bytes of address space, all of which count as locked once some are.
    #[must_use]
    pub fn address_space(&self) -> u64 {
        self.arena.address_space() as u64
    }

    /// How much of it receives payloads.
    #[must_use]
    pub fn staging(&self) -> &Staging {
        &self.staging
    }

    /// The memory behind the slots.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Who pays for its slots.
    pub(super) fn book(&self) -> &Book {
        &self.book
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Slots in so many bytes, one at least.
    pub(super) fn slots_in(&self, bytes: usize) -> usize {
        (bytes / self.block_size.in_memory()).max(1)
    }

    /// Fills `slots` with a magazine of free, zeroed slots, lowest last, neighbours side by side.
    pub(super) fn take(&self, slots: &mut Vec<u32>) -> Outcome<()> {
        loop {
            let mut state = self.lock();
            let wanted = self.slots_in(MAGAZINE);
            while slots.len() < wanted {
                let Some(&chunk) = state.available.first() else { break };
                match state.chunks[chunk as usize].take() {
                    Some(index) => slots.push(chunk * self.slots_per_chunk + index),
                    None => {
                        state.available.remove(&chunk);
                    }
                }
            }
            if !slots.is_empty() {
                state.free -= slots.len() as u64;
                state.taken += slots.len() as u64;
                if state.free < u64::from(state.reserve) * u64::from(self.slots_per_chunk) / 2 {
                    self.work.notify_one();
                }
                slots.reverse();
                return Ok(());
            }
            if !state.dirty.is_empty() {
                let at = state.dirty.len().saturating_sub(wanted);
                let dirty = state.dirty.split_off(at);
                drop(state);
                self.wipe(&dirty);
                slots.extend(dirty);
                return Ok(());
            }
            // The helper was too slow: touch a chunk here, and have more ready next time.
            state.reserve = (state.reserve * 2).min(MOST_RESERVE);
            if let Some(chunk) = self.pick_absent(&mut state) {
                drop(state);
                self.add_chunk(chunk)?;
            } else if state.wiping {
                // Some milliseconds at most, instead of an error to a session that is within its budget.
                drop(self.wait(state, TICK));
            } else {
                return Err(ErrorKind::OutOfSpace);
            }
        }
    }

    /// Takes the lowest chunk that has no memory.
    fn pick_absent(&self, state: &mut State) -> Option<u32> {
        if let Some(chunk) = state.absent.pop_first() {
            return Some(chunk);
        }
        let next = u32::try_from(state.chunks.len()).ok()?;
        if next >= self.arena.slots() / self.slots_per_chunk {
            return None;
        }
        state.chunks.push(Chunk::default());
        Some(next)
    }

    /// Gives memory to a chunk that was picked, and makes its slots available.
    fn add_chunk(&self, chunk: u32) -> Outcome<()> {
        let touched = self.arena.populate(chunk * self.slots_per_chunk, self.slots_per_chunk);
        let mut state = self.lock();
        if touched.is_err() {
            state.absent.insert(chunk);
            return Err(ErrorKind::OutOfSpace);
        }
        let fresh = &mut state.chunks[chunk as usize];
        (0..self.slots_per_chunk).for_each(|index| fresh.put(index));
        state.available.insert(chunk);
        state.free += u64::from(self.slots_per_chunk);
        Ok(())
    }

    /// Takes back wiped slots.
    pub(super) fn put(&self, slots: impl Iterator<Item = u32>) {
        let mut state = self.lock();
        for slot in slots {
            let (chunk, index) = (slot / self.slots_per_chunk, slot % self.slots_per_chunk);
            state.chunks[chunk as usize].put(index);
            state.available.insert(chunk);
            state.free += 1;
        }
    }

    /// Wipes free slots, neighbours in one go.
    pub(super) fn wipe(&self, slots: &[u32]) {
        for run in slots.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            self.arena.wipe(run[0], u32::try_from(run.len()).unwrap_or(u32::MAX));
        }
    }

    /// Takes back slots that nobody has any more, to be wiped by the helper.
    pub(super) fn take_later(&self, mut slots: Vec<u32>) {
        if self.overflow.is_some() {
            slots.retain(|&number| !self.take_place(number));
        }
        if !slots.is_empty() {
            self.lock().dirty.extend(slots);
            self.work.notify_one();
        }
    }

    /// The helper's life: keeps chunks ready, wipes, gives back, until [`Pool::stop`].
    pub fn tend(&self) {
        let mut state = self.lock();
        // Nothing is left unwiped, even at the end.
        while !state.stopping || !state.dirty.is_empty() {
            let wanted = u64::from(state.reserve) * u64::from(self.slots_per_chunk);
            if !state.dirty.is_empty() {
                let at = state.dirty.len().saturating_sub(self.slots_in(WIPE_AT_ONCE));
                let mut dirty = state.dirty.split_off(at);
                state.wiping = true;
                drop(state);
                dirty.sort_unstable();
                self.wipe(&dirty);
                self.put(dirty.into_iter());
                state = self.lock();
                state.wiping = false;
                self.work.notify_all();
            } else if state.free < wanted
                && let Some(chunk) = self.pick_absent(&mut state)
            {
                drop(state);
                let full = self.add_chunk(chunk).is_err();
                state = self.lock();
                if full {
                    state = self.wait(state, TICK).0;
                }
            } else {
                let timed_out;
                (state, timed_out) = self.wait(state, TICK);
                if timed_out {
                    state = self.give_back(state);
                }
            }
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> (MutexGuard<'a, State>, bool) {
        let (state, timeout) = self.work.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
        (state, timeout.timed_out())
    }

    /// A quiet moment: lowers the reserve, and gives chunks beyond it back to the system.
    fn give_back<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let per_chunk = u64::from(self.slots_per_chunk);
        if std::mem::take(&mut state.taken) < u64::from(state.reserve) * per_chunk / 2 {
            state.reserve = (state.reserve / 2).max(1);
        }
        let mut surplus = (state.free / per_chunk).saturating_sub(u64::from(state.reserve));
        // From the top, as use is from the bottom.
        let idle: Vec<u32> = state.available.iter().rev().copied().collect();
        for chunk in idle {
            if surplus == 0 || state.stopping {
                break;
            }
            if state.chunks[chunk as usize].free < self.slots_per_chunk {
                continue;
            }
            state.available.remove(&chunk);
            state.chunks[chunk as usize] = Chunk::default();
            state.free -= per_chunk;
            drop(state);
            let given = self.arena.discard(chunk * self.slots_per_chunk, self.slots_per_chunk);
            state = self.lock();
            if let Err(error) = given {
                tracing::warn!(%error, "block memory could not be given back");
            }
            state.absent.insert(chunk);
            surplus -= 1;
        }
        state
    }

    /// Ends [`Pool::tend`].
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.work.notify_all();
    }

    /// How many pay for its slots.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn accounts(&self) -> usize {
        self.book.len()
    }

    /// Slots that are neither free nor waiting to be wiped, those of magazines included.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub fn slots_in_use(&self) -> u64 {
        let state = self.lock();
        let present = state.chunks.len() as u64 - state.absent.len() as u64;
        present * u64::from(self.slots_per_chunk) - state.free - state.dirty.len() as u64
    }

    /// Slots that are free, and in no magazine.
    #[cfg(all(test, not(loom)))]
    pub(super) fn free_slots(&self) -> u64 {
        self.lock().free
    }

    /// Whether everything that came back in bulk is wiped by now.
    #[cfg(all(test, not(loom)))]
    pub(super) fn is_wiped(&self) -> bool {
        self.lock().dirty.is_empty()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::Magazine;
    use super::*;
    use crate::sys::{Left, Slot};

    fn free(pool: &Pool) -> u64 {
        pool.free_slots()
    }

    fn release_later(pool: &Pool, slots: impl Iterator<Item = Slot>) {
        let free = |slot: Slot| {
            let number = slot.number();
            assert_eq!(pool.arena.release(slot), Left::Nobody);
            number
        };
        pool.take_later(slots.map(free).collect());
    }

    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(90), "waited in vain for: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_full_pool_says_so_and_recovers() {
        let pool = Pool::new(2 << 20, BlockSize::new(1 << 20).unwrap()).unwrap();
        let mut magazine = Magazine::new(Arc::clone(&pool));
        let mut all: Vec<Slot> = std::iter::from_fn(|| magazine.allocate().ok()).collect();
        assert_eq!(all.len() as u64, u64::from(pool.arena().slots()));
        assert_eq!(magazine.allocate(), Err(ErrorKind::OutOfSpace));
        release_later(&pool, all.drain(..3));
        assert!(magazine.allocate().inspect(|_| ()).map(|slot| magazine.release(slot)).is_ok());
        release_later(&pool, all.drain(..));
    }

    #[test]
    fn the_helper_wipes_keeps_ready_and_gives_back() {
        let pool = Pool::new(64 << 20, BlockSize::DEFAULT).unwrap();
        let helper = std::thread::spawn({
            let pool = Arc::clone(&pool);
            move || pool.tend()
        });
        let mut magazine = Magazine::new(Arc::clone(&pool));
        let mut slots: Vec<Slot> = (0..8192).map(|_| magazine.allocate().unwrap()).collect();
        for slot in &mut slots {
            pool.arena().bytes_mut(slot).unwrap().fill(0xaa);
        }
        release_later(&pool, slots.drain(..));
        magazine.flush();
        wait_until("wiped", || pool.is_wiped());
        wait_until("given back", || free(&pool) <= 2 * 512);
        assert!(!pool.lock().absent.is_empty());
        for _ in 0..8192 {
            let slot = magazine.allocate().unwrap();
            assert!(super::super::is_zero(pool.arena().bytes(&slot)));
            release_later(&pool, [slot].into_iter());
        }
        pool.stop();
        helper.join().unwrap();
    }
}
