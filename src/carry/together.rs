//! Much to do, of which some can be done at the same time: what takes round trips need not wait for those of others.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};

/// What is shared by who works.
struct Work<T, E, F> {
    state: Mutex<State<T, E>>,
    wake: Condvar,
    at_once: usize,
    one: F,
}

struct State<T, E> {
    left: Vec<T>,
    /// How many threads there are, and how many of them do something.
    threads: usize,
    busy: usize,
    failed: Option<E>,
}

/// Does `one` for all in `first` and all that it gives back, for up to `at_once` at the same time, the last given first. Where there is
/// only one thing to do there is no other thread.
///
/// # Errors
/// The first of `one`'s: nothing is begun after it.
pub(crate) fn together<T, E, F>(at_once: usize, first: Vec<T>, one: F) -> Result<(), E>
where
    T: Send,
    E: Send,
    F: Fn(T) -> Result<Vec<T>, E> + Sync,
{
    let state = State { left: first, threads: 1, busy: 0, failed: None };
    let work = Work { state: Mutex::new(state), wake: Condvar::new(), at_once, one };
    std::thread::scope(|scope| work.run(scope));
    match work.lock().failed.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl<T, E, F> Work<T, E, F> {
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, E, F> Work<T, E, F>
where
    T: Send,
    E: Send,
    F: Fn(T) -> Result<Vec<T>, E> + Sync,
{
    /// Until there is nothing to do any more, and nobody who might find something.
    fn run<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() || (state.left.is_empty() && state.busy == 0) {
                return self.wake.notify_all();
            }
            let Some(item) = state.left.pop() else {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if !state.left.is_empty() && state.threads < self.at_once && state.busy + 1 == state.threads {
                // If there can be no more threads, those that there are do it.
                let helper = thread::Builder::new().spawn_scoped(scope, || self.run(scope));
                state.threads += usize::from(helper.is_ok());
            }
            state.busy += 1;
            drop(state);
            let busy = Busy(self);
            let done = (self.one)(item);
            state = self.lock();
            match done {
                Ok(more) => state.left.extend(more),
                Err(error) => drop(state.failed.get_or_insert(error)),
            }
            drop(state);
            drop(busy);
            state = self.lock();
        }
    }
}

/// Somebody who does something: nobody waits for one who has panicked.
struct Busy<'a, T, E, F>(&'a Work<T, E, F>);

impl<T, E, F> Drop for Busy<'_, T, E, F> {
    fn drop(&mut self) {
        self.0.lock().busy -= 1;
        self.0.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Barrier;

    #[test]
    fn all_is_done_that_is_found() {
        let done = Mutex::new(BTreeSet::new());
        let one = |n: u32| {
            assert!(done.lock().unwrap().insert(n), "{n} is done twice");
            Ok::<_, ()>(if n < 1000 { vec![2 * n, 2 * n + 1] } else { Vec::new() })
        };
        together(7, vec![1], one).unwrap();
        assert_eq!(done.into_inner().unwrap(), (1..2000).collect());
    }

    #[test]
    fn so_many_are_done_at_the_same_time() {
        // Each waits for all others.
        let barrier = Barrier::new(5);
        let one = |_: u8| {
            barrier.wait();
            Ok::<_, ()>(Vec::new())
        };
        together(5, vec![0; 5], one).unwrap();
    }

    #[test]
    fn nothing_is_begun_after_a_failure() {
        let begun = Mutex::new(0);
        let one = |n: u8| {
            *begun.lock().unwrap() += 1;
            if n == 7 { Err("seven") } else { Ok(Vec::new()) }
        };
        assert_eq!(together(1, vec![1, 2, 7, 3], one), Err("seven"));
        assert_eq!(*begun.lock().unwrap(), 2, "3 and 7");
    }

    #[test]
    #[should_panic]
    fn nobody_waits_for_one_who_panicked() {
        let barrier = Barrier::new(2);
        let one = |is_bad: bool| {
            barrier.wait();
            assert!(!is_bad);
            Ok::<_, ()>(Vec::new())
        };
        let _ = together(2, vec![true, false], one);
    }
}
