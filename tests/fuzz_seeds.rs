//! The bodies of the fuzz targets over their seeds, as a plain test: what fuzzing once found, or was started with, holds
//! on every run, without a fuzzer.

#[expect(unreachable_pub, reason = "the same file is the library of the fuzz targets")]
#[path = "../fuzz/src/lib.rs"]
mod bodies;

use std::fs;
use std::path::Path;

#[test]
fn every_seed_of_every_target_holds() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (target, body) in bodies::TARGETS {
        let mut count = 0;
        for entry in fs::read_dir(seeds.join(target)).expect("every target has seeds") {
            let path = entry.unwrap().path();
            let data = fs::read(&path).unwrap();
            eprintln!("{}", path.display());
            body(&data);
            // A seed cut off anywhere is a conversation cut off there.
            for end in 0..data.len().min(512) {
                body(&data[..end]);
            }
            count += 1;
        }
        assert!(count > 0, "no seed for {target}");
    }
}

#[test]
fn every_directory_of_seeds_is_a_target() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut names: Vec<_> =
        fs::read_dir(seeds).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    assert!(names.iter().eq(bodies::TARGETS.iter().map(|(name, _)| name)), "{names:?}");
}
