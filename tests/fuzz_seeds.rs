//! The bodies of the fuzz targets over their seeds, as plain tests: what fuzzing once found, or was started with, holds
//! on every run, without a fuzzer.

#[expect(unreachable_pub, reason = "the same file is the library of the fuzz targets")]
#[path = "../fuzz/src/lib.rs"]
mod bodies;

use std::fs;
use std::path::PathBuf;

/// Places where a seed is cut off, at most.
const MOST_CUTS: usize = 24;

fn seeds() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")
}

fn every_seed_holds(target: &str) {
    let (_, body) = bodies::TARGETS.iter().find(|(name, _)| *name == target).expect("a target");
    let mut count = 0;
    for entry in fs::read_dir(seeds().join(target)).expect("every target has seeds") {
        let path = entry.unwrap().path();
        let data = fs::read(&path).unwrap();
        eprintln!("{}", path.display());
        body(&data);
        // A seed cut off anywhere is a conversation cut off there.
        let step = data.len().div_ceil(MOST_CUTS).max(1);
        (0..data.len()).step_by(step).for_each(|end| body(&data[..end]));
        count += 1;
    }
    assert!(count > 0, "no seed for {target}");
}

macro_rules! targets {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            every_seed_holds(stringify!($target));
        })*

        const TESTED: &[&str] = &[$(stringify!($target)),*];
    };
}

targets! { answers arguments client conversation ext4 handshake option partition qcow2 request steps uri }

#[test]
fn every_directory_of_seeds_is_a_target_that_is_tested() {
    let mut names: Vec<_> = fs::read_dir(seeds())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, TESTED);
    assert!(bodies::TARGETS.iter().map(|(name, _)| name).eq(TESTED));
}
