//! Several connections that write to one session at the same time.

use super::MOST;
use crate::client::{Client, Haggling};
use crate::error::{Error, ErrorKind, Result};
use crate::net::Uri;
use crate::proto::CommandFlags;
use crossbeam::channel::{Receiver, Sender, bounded};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// Connections, each with a request on its way.
const WRITERS: usize = 4;
/// Jobs that wait for a writer: enough that none has to wait for the file.
const WAITING: usize = 2 * WRITERS;

/// Something to be written. Jobs are about different bytes, so they are done in any order.
pub(super) enum Job {
    Write(u64, Vec<u8>),
    Zero(Range<u64>),
}

pub(super) struct Writers {
    jobs: Sender<Job>,
    failed: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Writers {
    /// Connects as many writers as there are to be.
    pub(super) fn start(uri: &Uri) -> Result<Self> {
        let (jobs, orders) = bounded(WAITING);
        let failed = Arc::new(AtomicBool::new(false));
        let mut writers = Self { jobs, failed: Arc::clone(&failed), threads: Vec::new() };
        for number in 0..WRITERS {
            let client = Haggling::connect(uri)?.go(&uri.export)?;
            let (orders, failed) = (orders.clone(), Arc::clone(&failed));
            let thread = thread::Builder::new().name(format!("writer-{number}"));
            let thread = thread.spawn(move || {
                let written = write(client, &orders);
                failed.fetch_or(written.is_err(), Ordering::Relaxed);
                written
            });
            writers.threads.push(thread.map_err(|error| Error::io("Cannot start a thread", error))?);
        }
        Ok(writers)
    }

    /// Waits for a writer that takes it.
    pub(super) fn give(&self, job: Job) -> Result<()> {
        // The reason is told by `finish`.
        let over = || Error::new(ErrorKind::Io, "Nothing more can be written");
        if self.failed.load(Ordering::Relaxed) {
            return Err(over());
        }
        self.jobs.send(job).map_err(|_| over())
    }

    /// Waits until everything is written, or says why something cannot be.
    pub(super) fn finish(self) -> Result<()> {
        drop(self.jobs);
        let failed = |_| Err(Error::new(ErrorKind::Io, "A writer had failed"));
        let results: Vec<_> =
            self.threads.into_iter().map(|thread| thread.join().unwrap_or_else(failed)).collect();
        results.into_iter().collect()
    }
}

/// A writer's life.
fn write(mut client: Client, orders: &Receiver<Job>) -> Result<()> {
    for job in orders {
        match job {
            Job::Write(offset, data) => client.write(offset, &data, CommandFlags::NONE)?,
            Job::Zero(range) => {
                let mut at = range.start;
                while at < range.end {
                    let length = u32::try_from(range.end - at).unwrap_or(MOST).min(MOST);
                    client.write_zeroes(at, length, CommandFlags::NONE)?;
                    at += u64::from(length);
                }
            }
        }
    }
    client.flush()?;
    // Whoever comes next sees it; that this one has gone, the server finds out by itself.
    let _ = client.disconnect();
    Ok(())
}
