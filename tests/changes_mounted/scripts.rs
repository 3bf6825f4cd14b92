//! Random edits of a Debian root: what is told of them, against a walk of both trees.

use super::edits::script;
use super::interop_support::mounted::Mounted;
use super::support::Random;
use super::walk::{Walk, assert_same, told};
use super::{House, sync};

/// How many scripts are tried; more by `MEMDEV_CHANGES_SCRIPTS`.
const SCRIPTS: u64 = 8;
/// Scripts that are run in one session, one behind the other: the later ones find what the earlier ones left.
const IN_A_SESSION: u64 = 4;

#[test]
fn what_is_told_of_random_edits_is_what_a_walk_of_both_trees_finds() {
    let count = std::env::var("MEMDEV_CHANGES_SCRIPTS").ok();
    let count = count.map_or(SCRIPTS, |count| count.parse().expect("a number"));
    let house = House::debian();
    for first in (0..count).step_by(usize::try_from(IN_A_SESSION).unwrap()) {
        let session = format!("edited-{first}");
        let mut mounted = Mounted::new(&house.uri(&session));
        for seed in first..(first + IN_A_SESSION).min(count) {
            let mut random = Random::new(seed);
            let edits = 5 + usize::try_from(random.below(60)).unwrap();
            let done = script(&mounted.root(), &mut random, edits);
            // In use, with a journal that is not empty; or at rest.
            let in_use = random.below(2) == 0;
            if in_use {
                sync(&mounted);
            } else {
                mounted.unmount();
                mounted.mount();
                sync(&mounted);
            }
            let found = told(&house.changes(&session, &["--json", "--times"]));
            let expected = house.base.expected(&Walk::of(&mounted.root()));
            let what =
                format!("script {seed}, in use: {in_use}, {} edits, {} changes", done.len(), expected.len());
            assert!(!expected.is_empty(), "{what}");
            assert_same(&found, &expected, &what);
            if seed == first {
                // The kernel, asked, says the same, renames and all.
                let alone = house.changes(&session, &["--json", "--times"]);
                let mounted = house.changes(&session, &["--json", "--times", "--mount"]);
                assert!(alone == mounted, "{what}: {}", first_difference(&alone, &mounted));
            }
        }
        mounted.detach();
    }
    house.server.stop();
}

fn first_difference(one: &[u8], other: &[u8]) -> String {
    let (one, other) = (String::from_utf8_lossy(one), String::from_utf8_lossy(other));
    let different = one.lines().zip(other.lines()).find(|(one, other)| one != other);
    different.map_or_else(|| "one is longer".to_owned(), |(one, other)| format!("{one}\n{other}"))
}
