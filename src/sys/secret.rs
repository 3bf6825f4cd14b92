//! Memory for keys: not in core files, child processes or swap, and, where the kernel can do that, not even mapped by the kernel
//! itself (`memfd_secret`, Linux 5.14; on by default since 6.5).
//!
//! # Safety
//! A cell of the vault has one owner, a [`Secret`], from the time when its number is taken off the list until it is put back;
//! what is in it is written before there is a `Secret` and dropped with it. The vault, whose mapping the cells lie in, is kept by
//! each of them.

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::mm::MlockFlags;
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// What keeps the vault's memory from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hiding {
    /// No mapping but this process' own has it, the kernel's included.
    Secret,
    /// It is locked.
    Locked,
    /// It may be swapped out.
    Swappable,
}

/// A reserved range of memory with room for a number of secrets. Memory is taken as they come.
pub struct Vault {
    memory: MmapRaw,
    cell: usize,
    hiding: Hiding,
    free: Mutex<Free>,
}

/// Which cells are nobody's.
struct Free {
    given_back: Vec<usize>,
    /// Those from here on were never used.
    fresh: usize,
}

impl Vault {
    /// Room for at most `most` secrets of type `T`, or for fewer, where the memory that a process may lock is limited. To be made
    /// while the process may still do that.
    ///
    /// # Errors
    /// What `mmap(2)` says where there is no address space.
    pub fn reserve<T>(most: usize) -> io::Result<Arc<Self>> {
        // Cells share no cache lines, and so none is written to while another is read.
        let cell = size_of::<T>().max(1).next_multiple_of(align_of::<T>().max(64));
        let sizes = [most, most / 16, most / 256].map(|count| count.max(1) * cell);
        let hidden = sizes.into_iter().find_map(|size| Some((secret(size).ok()?, Hiding::Secret)));
        let (memory, hiding) = match hidden {
            Some(hidden) => hidden,
            None => ordinary(sizes[0])?,
        };
        memory.advise(Advice::DontFork)?;
        Ok(Arc::new(Self {
            memory,
            cell,
            hiding,
            free: Mutex::new(Free { given_back: Vec::new(), fresh: 0 }),
        }))
    }

    /// What keeps it from others.
    #[must_use]
    pub fn hiding(&self) -> Hiding {
        self.hiding
    }

    /// Puts a secret in, made where it is to lie as far as the compiler has it; the caller wipes the stack. `None` when there is
    /// no room.
    ///
    /// # Panics
    /// If the vault was reserved for a type that is smaller or less aligned.
    pub fn put<T>(self: &Arc<Self>, make: impl FnOnce() -> T) -> Option<Secret<T>> {
        assert!(size_of::<T>() <= self.cell && align_of::<T>() <= 64, "not what the vault is for");
        let index = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            match free.given_back.pop() {
                Some(index) => index,
                None if (free.fresh + 1) * self.cell <= self.memory.len() => {
                    free.fresh += 1;
                    free.fresh - 1
                }
                None => return None,
            }
        };
        let secret: Secret<T> = Secret { vault: Arc::clone(self), index, holds: PhantomData };
        // SAFETY: a cell within the mapping, large and aligned enough (a mapping begins at a page, cells at multiples of 64),
        // and nobody else's.
        unsafe { secret.address().write(make()) };
        Some(secret)
    }
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("hiding", &self.hiding).finish_non_exhaustive()
    }
}

/// Memory that the kernel takes out of its own mapping.
fn secret(size: usize) -> io::Result<MmapRaw> {
    // SAFETY: it takes flags, and makes a descriptor.
    let number = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let number = i32::try_from(number).unwrap_or(-1);
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made, and is nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
    file.set_len(size as u64)?;
    MmapOptions::new().len(size).map_raw(&file)
}

/// Ordinary memory, locked if that can be.
fn ordinary(size: usize) -> io::Result<(MmapRaw, Hiding)> {
    let memory = MmapRaw::from(MmapOptions::new().len(size).map_anon()?);
    memory.advise(Advice::DontDump)?;
    // SAFETY: the range is the mapping; locking changes no byte of it.
    let locked = unsafe { rustix::mm::mlock_with(memory.as_mut_ptr().cast(), size, MlockFlags::ONFAULT) };
    Ok((memory, if locked.is_ok() { Hiding::Locked } else { Hiding::Swappable }))
}

/// A value in a [`Vault`]. When it is dropped, the memory is wiped.
pub struct Secret<T> {
    vault: Arc<Vault>,
    index: usize,
    holds: PhantomData<T>,
}

impl<T> Secret<T> {
    fn address(&self) -> *mut T {
        self.vault.memory.as_mut_ptr().wrapping_add(self.index * self.vault.cell).cast()
    }
}

impl<T> Deref for Secret<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: it was written when `self` was made, and nothing gives `&mut` to it.
        unsafe { &*self.address() }
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl<T> Drop for Secret<T> {
    fn drop(&mut self) {
        let address = self.address();
        // SAFETY: it was written when `self` was made, and is not used again.
        unsafe { address.drop_in_place() };
        // SAFETY: the cell is this secret's, all of it.
        unsafe { address.cast::<u8>().write_bytes(0, self.vault.cell) };
        // SAFETY: its first byte was just written to.
        zeroize::optimization_barrier(unsafe { &*address.cast::<u8>() });
        let mut free = self.vault.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.given_back.push(self.index);
    }
}

// SAFETY: it is a `T` and an `Arc`; where the `T` lies makes no difference.
unsafe impl<T: Send> Send for Secret<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Secret<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(vault: &Vault, index: usize) -> Vec<u8> {
        // SAFETY: a cell of the mapping that nobody writes to meanwhile.
        unsafe {
            std::slice::from_raw_parts(vault.memory.as_ptr().wrapping_add(index * vault.cell), vault.cell)
        }
        .to_vec()
    }

    #[test]
    fn a_secret_is_wiped_and_its_place_used_again() {
        let vault = Vault::reserve::<[u8; 100]>(2).unwrap();
        let first = vault.put(|| [1_u8; 100]).unwrap();
        let second = vault.put(|| [2_u8; 100]).unwrap();
        assert_eq!((*first, *second), ([1; 100], [2; 100]));
        assert_eq!(look(&vault, 0)[..100], [1; 100]);
        drop(first);
        assert!(look(&vault, 0).iter().all(|&byte| byte == 0));
        let third = vault.put(|| [3_u8; 100]).unwrap();
        assert_eq!((*second, *third), ([2; 100], [3; 100]));
    }

    #[test]
    fn a_full_vault_says_so() {
        let vault = Vault::reserve::<u64>(1).unwrap();
        let all: Vec<_> = std::iter::from_fn(|| vault.put(|| 7_u64)).take(1000).collect();
        assert!(!all.is_empty() && all.len() < 1000);
        drop(all);
        assert!(vault.put(|| 7_u64).is_some());
    }

    #[test]
    fn where_the_kernel_hides_nothing_memory_is_locked_at_least() {
        let (memory, _) = ordinary(4096).unwrap();
        assert_eq!(memory.len(), 4096);
    }
}
