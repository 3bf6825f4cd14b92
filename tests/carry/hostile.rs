//! Whoever is inside, or has left things at the destination, gets no further than the two directories.

use std::fs;

use crate::conflicts::only;
use crate::house::House;
use crate::interop_support::said;
use crate::machine::once_told;
use crate::support::wait_until;

#[test]
fn links_are_carried_as_links_and_lead_the_carrier_nowhere() {
    let house = House::new();
    let secret = house.place.path("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "host").unwrap();
    // A link to a directory of the host gets to the destination; then a directory takes its name inside.
    let dir = secret.display();
    house.sh(&[], &format!("ln -s {dir} trap; ln -s {dir}/key file; ln -s /etc/shadow shadow"));
    assert!(house.dest("trap").symlink_metadata().unwrap().is_symlink());
    house.sh(&["--carry-deletes"], "rm trap file; mkdir trap; echo evil >trap/key; echo evil >file");
    assert_eq!(fs::read_to_string(secret.join("key")).unwrap(), "host");
    assert_eq!(house.read("trap/key"), "evil\n");
    assert_eq!(house.read("file"), "evil\n");
}

#[test]
fn what_is_exchanged_in_a_race_leads_nowhere() {
    let house = House::new();
    let outside = house.place.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "host").unwrap();
    let script = format!(
        "mkdir real; echo mine >real/f; ln -s {} fake; i=0; \
         while [ $i -lt 2000 ]; do mv real d; echo mine >d/f; mv d real; mv fake d; mv d fake; i=$((i+1)); done",
        outside.display()
    );
    let output = house.attempt(&["--carry-deletes"], &script);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(outside.join("f")).unwrap(), "host");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(house.read("real/f"), "mine\n");
    assert!(!house.tree().iter().any(|line| line.contains("host")), "{:?}", house.tree());
}

#[test]
fn the_carried_directory_itself_may_be_exchanged() {
    let house = House::new();
    let output = house.attempt(
        &["--carry-deletes"],
        "echo 1 >x; cd /; sleep 1; mv home away; ln -s / home; echo 2 >away/u/x; sleep 1; rm home; mv away home",
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(house.tree(), ["x 644 2"]);
    assert_eq!(house.read("x"), "2\n");
}

#[test]
fn what_is_no_file_does_not_hold_anybody_up() {
    let house = House::new();
    let told = house.sh(&[], "mkfifo a-pipe; echo fine >z; mkdir d; mkfifo d/pipe; echo fine >d/z");
    assert!(told.contains("devices, pipes and sockets are not carried"), "{told}");
    assert_eq!(house.tree(), ["d/ 755", "d/z 644 5", "z 644 5"]);
    // Nor at the destination.
    let pipe = house.dest("other-pipe");
    let made =
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0);
    made.unwrap();
    let told = house.sh(&[], "test ! -e other-pipe; echo more >z");
    assert!(told.contains("other-pipe is no file at the destination"), "{told}");
}

#[test]
fn a_deep_tree_and_a_long_name_do_not_hold_up_the_others() {
    let house = House::new();
    let deep = "n=$(printf '%0250d' 0); i=0; while [ $i -lt 30 ]; do mkdir $n && cd $n || break; i=$((i+1)); done; echo >x; cd /home/u; echo fine >z";
    let output = house.attempt(&["--carry-wait", "6s"], deep);
    assert_eq!(house.read("z"), "fine\n");
    // What no program could name at the destination is said to be left.
    assert!(said(&output).contains("file name too long"), "{}", said(&output));
    assert!(said(&output).len() < 4000, "{}", said(&output));
}

#[test]
fn the_mount_that_is_carried_from_is_seen_by_nobody() {
    let house = House::new();
    let running = house
        .start(&[], "cat /proc/self/mountinfo >mounts; ls -l /proc/self/fd /proc/1/fd >fds 2>&1; sleep 1000");
    wait_until("it is delivered", || house.dest("fds").exists() && house.dest("mounts").exists());
    let device = running.attachment()["device"].as_str().unwrap().to_owned();
    let outside = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!outside.contains(&format!("{device} ")), "{outside}");
    let inside = house.read("mounts");
    assert!(!inside.contains("dest"), "{inside}");
    assert!(!house.read("fds").contains("carry"));
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
}

/// Holes were not read on the way out, but on the way in: a file with a hole of some terabytes, which anybody can make, held
/// up every login after it for hours.
#[test]
fn a_huge_hole_does_not_hold_up_who_comes_next() {
    let house = House::new();
    house.sh(&[], "truncate -s 8T huge; echo end >>huge");
    let size = house.dest("huge").metadata().unwrap().len();
    assert_eq!(size, (8 << 40) + 4);
    house.sh(
        &["--carry-deletes"],
        "stat -c %s huge >size; tail -c 4 huge >>size; echo small >new; mv new huge",
    );
    assert_eq!(house.read("size"), format!("{size}\nend\n"));
    assert_eq!(house.read("huge"), "small\n");
    assert_eq!(fs::read_dir(house.dest("")).unwrap().count(), 2);
}

/// One session's huge file is in the way of another one's small one.
#[test]
fn a_huge_hole_is_not_read_to_be_compared() {
    let house = House::new();
    let mut running = house.start(&[], &once_told("echo small >x; sleep 1000"));
    assert_eq!(running.line(), "set\n");
    fs::File::create(house.dest("x")).unwrap().set_len(8 << 40).unwrap();
    running.tell();
    wait_until("it is delivered", || house.dest("x").metadata().unwrap().len() == 6);
    only(&house, "x.conflict-other-");
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
}

/// Root would write wherever it points to.
#[test]
fn a_destination_is_not_behind_a_link_of_somebody_elses() {
    let house = House::new();
    let link = house.place.path("link");
    std::os::unix::fs::symlink("dest", &link).unwrap();
    let through = House::to(link.clone());
    through.sh(&[], "echo 1 >x");
    assert_eq!(house.read("x"), "1\n", "a link of root's is one");
    std::os::unix::fs::lchown(&link, Some(4711), None).unwrap();
    let output = through.attempt(&[], "echo 2 >x");
    assert!(!output.status.success());
    assert!(said(&output).contains("link: a symbolic link that is not root's"), "{}", said(&output));
    assert_eq!(house.read("x"), "1\n");
}
