//! What `login.toml` may say, and what is said of it.

use super::*;

const TEXT: &str = r#"
[default]
image = "/srv/debian.img"

[[user]]
name = "joe"
session = "nbd+unix:///root@{user}?socket=/run/nbd.sock"
binds = ["{home}:/home/{user}", "/opt:/opt:ro"]
hostname = "box-{uid}"
env = { EDITOR = "vi", PS1 = "${X}" }
memory = "2G"
pids_limit = 200
memory_limit = "1G"
swap = "never"
second = "join"

[[user]]
name = "eve=/srv/homes/joe"
image = "/srv/debian.img"
carry = ["/home/{user}=/srv/homes/{user}", "/work={home}"]
carry_deletes = true
carry_rules = ["/etc/memdev/rules"]
carry_exclude = [".cache/", "*.o"]
carry_include = ["keep.o"]
carry_wait = "5s"
carry_recipient = "age1qqq"

[[group]]
name = "staff"
image = "/srv/staff.img"
partition = 2
privileged = true
net = "none"

[[group]]
name = "users"
image = "/srv/users.img"
user = "root"
second = "refuse"
"#;

fn person(name: &str, groups: &[&str]) -> Person {
    let groups = groups.iter().map(|&name| name.to_owned()).collect();
    Person { name: name.into(), uid: 1000, gid: 1001, home: format!("/home/of/{name}").into(), groups }
}

#[test]
fn the_user_comes_before_the_group_before_the_default() {
    let settings = Settings::parse(TEXT).unwrap();
    let grant = |name: &str, groups: &[&str]| settings.grant(&person(name, groups)).unwrap();
    let joe = grant("joe", &["users", "staff"]);
    assert_eq!(joe.because, "[[user]] 'joe'");
    let Source::Export(uri) = &joe.run.source else { panic!("a session") };
    assert_eq!(uri.export, "root@joe");
    let binds: Vec<_> =
        joe.run.binds.iter().map(|bind| (bind.source.to_str().unwrap(), bind.read_only)).collect();
    assert_eq!(binds, [("/home/of/joe", false), ("/opt", true)]);
    assert_eq!(joe.run.hostname.as_deref(), Some("box-1000"));
    assert_eq!(joe.run.env[1], ("PS1".into(), "${X}".into()));
    assert_eq!(joe.run.limits, Limits { pids: Some(200), memory: Some(1 << 30), swap: Swap::Never });
    assert_eq!((joe.run.memory, joe.second), (Some(2 << 30), Second::Join));
    assert_eq!(joe.run.user.as_deref(), Some("joe"));
    assert_eq!(joe.run.stranger.as_ref().unwrap().user, 1000);
    // The first in the file, not the first of the user's.
    let ann = grant("ann", &["users", "staff"]);
    assert_eq!(ann.because, "[[group]] 'staff'");
    assert_eq!((ann.run.partition, ann.run.privileged, ann.run.network), (Some(2), true, Network::None));
    assert_eq!(ann.run.user.as_deref(), Some("1000:1001"));
    let eve = grant("eve", &["users"]);
    assert_eq!((eve.run.user.as_deref(), eve.run.stranger.is_none()), (Some("root"), true));
    assert_eq!(eve.second, Second::Refuse);
    let other = grant("other", &["nobody"]);
    assert_eq!((other.because.as_str(), other.second), ("[default]", Second::Own));
    // What an entry does not say is not taken from another.
    assert!(eve.run.binds.is_empty() && eve.run.env.is_empty());
}

#[test]
fn where_files_are_carried_to_is_not_the_users_to_say() {
    let settings = Settings::parse(TEXT).unwrap();
    let name = "eve=/srv/homes/joe";
    let grant = settings.grant(&person(name, &[])).unwrap();
    let carrying = &grant.run.carrying;
    let carry = |path: &str, destination: &str| {
        crate::carry::Carry::new(path.into(), destination.to_owned()).unwrap()
    };
    // What is put in is no part of the grammar.
    let expected = [
        carry("/home/eve=/srv/homes/joe", "/srv/homes/eve=/srv/homes/joe"),
        carry("/work", "/home/of/eve=/srv/homes/joe"),
    ];
    assert_eq!(carrying.carries, expected);
    assert!(carrying.of_user && carrying.deletes);
    assert_eq!(carrying.patience, std::time::Duration::from_secs(5));
    assert_eq!((carrying.exclude.len(), carrying.include.len(), carrying.rules.len()), (2, 1, 1));
    let shown = grant.to_string();
    assert!(shown.contains("carry      /work to /home/of/eve=/srv/homes/joe\n"), "{shown}");
    assert!(shown.contains("the spool encrypted to age1qqq\n"), "{shown}");
    assert!(shown.contains("is removed there, too; given up after 5s without a success\n"), "{shown}");
    assert!(shown.contains("by PAM     refused: A login program ends before"), "{shown}");
    assert!(shown.contains("'carry' out of the entry, or use the login shell\n"), "{shown}");
    let nothing = settings.grant(&person("ann", &[])).unwrap();
    assert!(nothing.run.carrying.carries.is_empty() && nothing.by_pam().is_ok());
}

#[test]
fn without_an_entry_there_is_nothing() {
    let settings = Settings::parse("[[user]]\nname = 'joe'\nimage = '/x'\n").unwrap();
    assert!(settings.grant(&person("joe", &[])).is_ok());
    assert_eq!(settings.grant(&person("ann", &["joe"])).unwrap_err().kind(), ErrorKind::Denied);
    let none = Settings::parse("").unwrap();
    assert_eq!(none.summary(), "everybody else: refused\n");
}

#[test]
fn mistakes_are_told() {
    for (text, why) in [
        ("[default]\nimage = /x", "line 2: "),
        ("[default]\nimage = '/x'\ncolour = 'red'", "line 3: unknown field `colour`"),
        ("[defaults]\nimage = '/x'", "unknown field `defaults`"),
        ("[default]", "[default]: image or session is missing"),
        ("[default]\nimage = '/x'\nsession = 'y'", "exclude each other"),
        ("[default]\nimage = 'x.img'", "'x.img' is no absolute path"),
        ("[default]\nsession = '/run/x'", "is no URI"),
        ("[default]\nname = 'x'\nimage = '/x'", "it has no name"),
        ("[[user]]\nimage = '/x'", "[[user]]: name is missing"),
        ("[[user]]\nname='a'\nimage='/x'\n[[user]]\nname='a'\nimage='/x'", "'a' is there twice"),
        ("[default]\nimage='/x'\nbinds=['a:/b']", "'a:/b' is no absolute path"),
        ("[default]\nimage='/x'\nbinds=['/a']", "binds: '/a' does not parse"),
        ("[default]\nimage='/x'\nbinds=['/h/{name}:/b']", "none of {user}"),
        ("[default]\nimage='/x'\nmemory='2 G'", "memory: unknown unit"),
        ("[default]\nimage='/x'\npids_limit=1", "2 processes at least"),
        ("[default]\nimage='/x'\nmemory_limit='1K'", "less than 4 MiB"),
        ("[default]\nimage='/x'\nswap='some'", "line 3: unknown variant `some`"),
        ("[default]\nimage='/x'\nenv={'A=B'='c'}", "env: 'A=B'"),
        ("[default]\nimage='/x'\nsecond='both'", "line 3: unknown variant `both`"),
        ("[default]\nimage='/x'\npartition=0", "counted from 1"),
        ("[default]\nimage='/x'\nlogins=0", "logins: 0 is not from 1 to 64"),
        ("[default]\nimage='/x'\nlogins=65", "logins: 65 is not"),
        ("[default]\nimage='/x'\nuser=''", "user: it is empty"),
        ("[default]\nimage='/x'\ncarry=['/a']", "carry: '/a' does not parse; write PATH=DEST"),
        ("[default]\nimage='/x'\ncarry=['/a=b']", "carry: 'b' is no absolute path"),
        ("[default]\nimage='/x'\ncarry=['/a=/b/../c']", "without '..'"),
        ("[default]\nimage='/x'\ncarry=['/a=sftp://b/c']", "is no directory; mount it"),
        ("[default]\nimage='/x'\ncarry=['/a=/b/%u']", "carry: '%u' stands for nothing here; write {user}"),
        ("[default]\nimage='/x'\ncarry=['/a=/b/{me}']", "none of {user}"),
        ("[default]\nimage='/x'\ncarry=['/tmp=/b']", "/tmp is not on the private root's disk"),
        ("[default]\nimage='/x'\ncarry=['/a=/b','/a/c=/d']", "one of them is in the other"),
        ("[default]\nimage='/x'\ncarry=['/a=/b']\nsecond='join'", "carry: not with second = 'join'"),
        ("[default]\nimage='/x'\ncarry=['/a=/b']\ncarry_wait='5 s'", "carry_wait: unknown unit"),
        ("[default]\nimage='/x'\ncarry=['/a=/b']\ncarry_recipient='joe'", "is no recipient of age"),
        ("[default]\nimage='/x'\ncarry_recipient='age1x'", "carry_recipient: without carry"),
        ("[default]\nimage='/x'\ncarry=['/a=/b']\ncarry_exclude=['a{b']", "the pattern 'a{b'"),
        ("[default]\nimage='/x'\ncarry=['/a=/b']\ncarry_rules=['r']", "'r' is no absolute path"),
        ("[default]\nimage='/x'\ncarry_deletes=true", "carry_deletes: without carry"),
    ] {
        let error = Settings::parse(text).expect_err(text);
        assert!(error.contains(why), "{text}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn what_somebody_gets_is_shown() {
    let settings = Settings::parse(TEXT).unwrap();
    let shown = settings.grant(&person("joe", &[])).unwrap().to_string();
    assert!(shown.contains("user       joe of the image, or else 1000:1001\n"), "{shown}");
    assert!(shown.contains("bind       /opt on /opt (read-only)\n"), "{shown}");
    assert!(shown.ends_with("second     join\n"), "{shown}");
}
