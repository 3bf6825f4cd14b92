//! The life of a short session: connect, handshake, first read, disconnect.

use std::io;
use std::time::{Duration, Instant};

use memdev::{Error, Result};

use crate::drive::{Outcome, cpu_seconds};
use crate::lane::{Lane, Tally};
use crate::pattern::{Pattern, Plan, Source};
use crate::target::Target;

/// Opens sessions one after the other, on each of `threads` threads, until the time or the number is used up.
/// Each reads one random block; its latency is from connect to close.
pub(crate) fn open(
    target: &Target,
    plan: &Plan,
    time: Duration,
    requests: Option<u64>,
    threads: usize,
) -> Result<Outcome> {
    let cpu = cpu_seconds();
    let begin = Instant::now();
    let share = requests.map_or(u64::MAX, |all| all.div_ceil(threads as u64));
    let tallies = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads as u64)
            .map(|index| {
                let plan = Plan { pattern: Pattern::RandRead, seed: plan.seed.wrapping_add(index), ..*plan };
                scope.spawn(move || one_after_the_other(target, &plan, begin, time, share))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<Vec<_>>>()
    })?;
    let mut tally = Tally::new();
    tallies.iter().for_each(|part| tally.add(part));
    let elapsed = Duration::from_nanos(tally.last);
    Ok(Outcome { tally, elapsed, client_cpu: cpu_seconds() - cpu })
}

fn one_after_the_other(
    target: &Target,
    plan: &Plan,
    begin: Instant,
    time: Duration,
    count: u64,
) -> Result<Tally> {
    let (mut tally, mut first) = (Tally::new(), Tally::new());
    let mut source = Source::new(plan, 0, 1);
    let mut buffer = vec![0; 64 << 10];
    for _ in 0..count {
        let start = Instant::now();
        if start - begin > time {
            break;
        }
        let mut lane = Lane::new(target.connect()?);
        let mut read = || -> io::Result<()> {
            lane.load(source.clone(), 1, 1);
            lane.refill(0, &[])?;
            while lane.in_flight() > 0 {
                lane.receive(&mut buffer, true, || 0, u64::MAX, &mut first)?;
            }
            lane.disconnect();
            Ok(())
        };
        read().map_err(|e| Error::io("Cannot read the first block", e))?;
        drop(lane);
        let _ = source.next();
        let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let now = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        tally.count(took, plan.block, now);
    }
    tally.errors = first.errors;
    Ok(tally)
}
