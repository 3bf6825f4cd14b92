//! Two sessions that change the same, and people who change what is at the destination.

use std::fs;

use crate::house::House;
use crate::interop_support::said;
use crate::machine::once_told;
use crate::support::wait_until;

/// The one file at the destination whose name begins so. It may have it a moment after what took its place.
#[track_caller]
pub fn only(house: &House, begin: &str) -> String {
    let names = || {
        let names = fs::read_dir(house.dest("")).unwrap().map(|entry| entry.unwrap().file_name());
        let names = names.map(|name| name.into_string().unwrap());
        names.filter(|name| name.starts_with(begin)).collect::<Vec<_>>()
    };
    wait_until("it is beside", || !names().is_empty());
    let names = names();
    assert_eq!(names.len(), 1, "{names:?}");
    names[0].clone()
}

#[test]
fn the_later_keeps_the_name_and_the_earlier_is_beside() {
    let house = House::new();
    fs::write(house.dest("x"), "before").unwrap();
    let mut first = house.start(&["--name", "first"], &once_told("echo of the first >x; sleep 1000"));
    assert_eq!(first.line(), "set\n");
    let second =
        house.attempt_beside(&["--name", "second"], "test $(cat x) = before && echo of the second >x");
    assert!(second.status.success() && second.stderr.is_empty(), "{}", said(&second));
    assert_eq!(house.read("x"), "of the second\n");
    first.tell();
    wait_until("the first has delivered", || house.read("x") == "of the first\n");
    let kept = only(&house, "x.conflict-");
    assert!(kept.starts_with("x.conflict-second-20"), "{kept}");
    assert_eq!(house.read(&kept), "of the second\n");
    wait_until("it is told", || {
        house.status()["running"][0]["notes"].to_string().contains("x was changed by another session as well")
    });
    drop(first);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    // The next one is told as well.
    let said = house.sh(&[], "test -e x.conflict-second-*");
    assert!(said.contains("there are 1 files that are called *.conflict-*"), "{said}");
}

#[test]
fn what_somebody_edits_at_the_destination_is_kept() {
    let house = House::new();
    fs::write(house.dest("x"), "before").unwrap();
    let mut running = house.start(&[], &once_told("echo inside >x; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(house.dest("x"), "outside").unwrap();
    running.tell();
    wait_until("it is delivered", || house.read("x") == "inside\n");
    let kept = only(&house, "x.conflict-");
    assert!(kept.starts_with("x.conflict-other-"), "{kept}");
    assert_eq!(house.read(&kept), "outside");
}

#[test]
fn the_same_from_both_is_no_conflict() {
    let house = House::new();
    let mut running = house.start(&[], &once_told("echo same >x; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(house.dest("x"), "same\n").unwrap();
    running.tell();
    wait_until("it is delivered", || house.status()["running"][0]["delivered"] == 1);
    assert_eq!(house.tree().len(), 1);
}

#[test]
fn what_was_changed_elsewhere_is_not_removed() {
    let house = House::new();
    fs::write(house.dest("x"), "before").unwrap();
    let mut running = house.start(&["--carry-deletes"], &once_told("rm x; echo >removed; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::write(house.dest("x"), "changed").unwrap();
    running.tell();
    wait_until("it is told", || {
        house.status()["running"][0]["notes"].to_string().contains("x has been changed at the destination")
    });
    assert_eq!(house.read("x"), "changed");
}

#[test]
fn who_was_overwritten_is_told_at_the_end() {
    let house = House::new();
    let output = {
        let carry = format!("/home/u={}", house.dest("").display());
        let script = "echo one >x; read go; exit 0";
        let mut command =
            house.place.run(&["--carry", &carry, "--workdir", "/home/u"], &["sh", "-c", script]);
        command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        wait_until("it is delivered", || house.read("x") == "one\n");
        fs::write(house.dest("x"), "two").unwrap();
        drop(child.stdin.take());
        child.wait_with_output().unwrap()
    };
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("x has been changed at the destination by somebody else"), "{said}");
    assert_eq!(house.read("x"), "two");
}
