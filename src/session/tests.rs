//! Who gets which session, and what becomes of it.

use super::*;
use crate::base::Source;
use crate::error::ErrorKind;
use crate::net::{Address, Listener, Most, Stream};
use crate::overlay::{BlockSize, Budget, Magazine, Pool, State};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

struct House {
    registry: Arc<Registry>,
    dir: tempfile::TempDir,
    listener: Listener,
}

fn house(linger: Duration) -> House {
    let dir = tempfile::tempdir().unwrap();
    let source = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![1; 8192]).unwrap();
        Source::open(name, &path).unwrap()
    };
    let pool = Pool::new(8 << 20, BlockSize::DEFAULT).unwrap();
    let limits = Limits {
        session_memory: 1 << 20,
        linger,
        sessions: Most { all: 100, each: None },
        caps: Caps::default(),
        seal: false,
    };
    let registry = Registry::new(vec![source("root"), source("other")], pool, Budget::total(8 << 20), limits);
    let listener = Listener::bind(&Address::Unix(dir.path().join("socket"))).unwrap();
    House { registry, dir, listener }
}

impl House {
    fn connect(&self) -> (UnixStream, Arc<Stream>) {
        let client = UnixStream::connect(self.dir.path().join("socket")).unwrap();
        (client, Arc::new(self.listener.accept().unwrap().unwrap()))
    }

    fn attach(&self, name: &str) -> (UnixStream, Attachment) {
        let (client, stream) = self.connect();
        (client, self.registry.attach(name, &stream).unwrap().1)
    }
}

fn write(attachment: &Attachment, value: u8) {
    let device = attachment.session().device();
    let mut magazine = Magazine::new(Arc::clone(device.overlay().pool()));
    device.write(0, &[value; 4096], &mut magazine).unwrap();
}

fn is_written(attachment: &Attachment) -> bool {
    attachment.session().device().overlay().state(0) == State::Allocated
}

#[test]
fn a_plain_name_is_a_session_of_ones_own() {
    let house = house(Duration::ZERO);
    let (_a, one) = house.attach("root");
    let (_b, two) = house.attach("");
    write(&one, 7);
    assert!(is_written(&one) && !is_written(&two));
    assert_eq!(house.registry.named_sessions(), 0);
}

#[test]
fn a_named_session_is_shared_by_name_and_image() {
    let house = house(Duration::from_secs(60));
    let (_a, one) = house.attach("root@x");
    write(&one, 7);
    assert!(is_written(&house.attach("root@x").1));
    assert!(is_written(&house.attach("@x").1));
    assert!(!is_written(&house.attach("other@x").1));
    assert!(!is_written(&house.attach("root@y").1));
}

#[test]
fn who_asks_for_a_session_that_is_there_makes_none() {
    let house = house(Duration::from_secs(60));
    let (_client, stream) = house.connect();
    let refused = house.registry.attach("root@x?", &stream).unwrap_err();
    assert_eq!((refused.kind(), house.registry.named_sessions()), (ErrorKind::NotFound, 0));
    let (_a, one) = house.attach("root@x");
    write(&one, 7);
    assert_eq!(house.registry.describe("root@x?", &stream).unwrap().name, "root@x");
    assert!(is_written(&house.attach("root@x?").1));
    let other = house.registry.attach("other@x?", &stream).unwrap_err();
    assert_eq!((other.kind(), house.registry.named_sessions()), (ErrorKind::NotFound, 1));
}

#[test]
fn who_only_looks_at_a_session_that_waits_for_its_client_does_not_make_it_its_own() {
    let house = house(Duration::ZERO);
    let (_client, stream) = house.connect();
    let party = crate::net::Party::of(stream.peer());
    house.registry.create("root@made", party, None, false).unwrap();
    assert_eq!(
        house.registry.create("root@other?", party, None, false).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    let (_looker, looking) = house.attach("root@made?");
    assert!(looking.session().owner.get().is_none());
    drop(looking);
    assert!(house.registry.end_idle_for_test(Duration::from_secs(60)), "it still waits");
    let (_a, one) = house.attach("root@made");
    assert!(one.session().owner.get().is_some());
    drop(one);
    assert!(!house.registry.end_idle_for_test(Duration::from_secs(60)), "it was entered and left");
}

#[test]
fn a_named_session_lingers_and_then_ends() {
    let house = house(Duration::from_secs(600));
    let (_a, one) = house.attach("root@x");
    write(&one, 7);
    drop(one);
    // The test itself may take a while.
    assert!(house.registry.end_idle_for_test(Duration::from_secs(300)));
    assert!(is_written(&house.attach("root@x").1));
    assert!(!house.registry.end_idle_for_test(Duration::from_secs(601)));
    assert!(!is_written(&house.attach("root@x").1));
}

impl Registry {
    /// Whether a named session is left when so much time has gone by.
    fn end_idle_for_test(&self, after: Duration) -> bool {
        self.end_idle(Instant::now() + after);
        self.named_sessions() > 0
    }
}

#[test]
fn a_fenced_line_gets_no_turn() {
    let house = house(Duration::from_secs(60));
    let (client, old) = house.attach("root@x");
    let (_b, alive) = house.attach("root@x");
    assert!(matches!(old.line().turn(), Turn::Granted(_)));
    drop(client);
    let (_c, new) = house.attach("root@x");
    assert!(matches!(old.line().turn(), Turn::Fenced));
    assert!(matches!(alive.line().turn(), Turn::Granted(_)) && matches!(new.line().turn(), Turn::Granted(_)));
}

#[test]
fn a_tcp_line_in_the_middle_of_something_is_doubtful_until_somebody_vouches() {
    let house = house(Duration::from_secs(60));
    let listener = Listener::bind(&Address::tcp("127.0.0.1:0").unwrap()).unwrap();
    let Address::Tcp { port, .. } = *listener.address() else { panic!("not TCP") };
    let attach = || {
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let stream = loop {
            match listener.accept().unwrap() {
                Some(stream) => break Arc::new(stream),
                None => std::thread::yield_now(),
            }
        };
        (client, house.registry.attach("root@x", &stream).unwrap().1)
    };
    let (_a, idle) = attach();
    let (_b, busy) = attach();
    busy.line().set_in_request(true);
    let (_c, _new) = attach();
    assert!(matches!(idle.line().turn(), Turn::Granted(_)));
    assert!(matches!(busy.line().turn(), Turn::Doubtful));
    busy.line().vouch();
    assert!(matches!(busy.line().turn(), Turn::Granted(_)));
}

#[test]
fn what_does_not_exist_or_makes_no_sense_is_refused() {
    let house = house(Duration::ZERO);
    let (_client, stream) = house.connect();
    let kind = |name: &str| house.registry.describe(name, &stream).unwrap_err().kind();
    assert_eq!(kind("nothing"), ErrorKind::NotFound);
    assert_eq!(kind("nothing@x"), ErrorKind::NotFound);
    assert_eq!(kind("root@"), ErrorKind::Invalid);
    assert_eq!(kind("root@x?"), ErrorKind::NotFound);
    assert_eq!(kind("root@x??"), ErrorKind::Invalid);
    assert_eq!(kind("root@a b"), ErrorKind::Invalid);
    let described = house.registry.describe("@x", &stream).unwrap();
    assert_eq!((described.name.as_str(), described.size, described.shared), ("root@x", 8192, true));
    assert_eq!(house.registry.named_sessions(), 0);
    house.registry.stop();
    assert_eq!(kind("root"), ErrorKind::Shutdown);
}

#[test]
fn a_session_belongs_to_the_user_who_made_it() {
    let user = |uid| Peer { kind: PeerKind::Unix { uid, pid: 1 }, certificate: None };
    let network = Peer { kind: PeerKind::Tcp { addr: ([127, 0, 0, 1], 1).into() }, certificate: None };
    assert!(Owner::of(&user(1)).admits(&user(1)));
    assert!(!Owner::of(&user(1)).admits(&user(2)));
    assert!(!Owner::of(&user(1)).admits(&user(0)));
    assert!(!Owner::of(&user(1)).admits(&network));
    assert!(Owner::of(&network).admits(&network) && !Owner::of(&network).admits(&user(1)));
}

/// [`Registry::end_all`] takes all chores itself, and took the one by which [`Registry::stop`] had told the housekeeper:
/// in one stop of the server out of a few he was still asleep then, and slept on for an hour.
#[test]
fn the_housekeeper_hears_of_the_stop_though_everything_is_ended_at_once() {
    for _ in 0..20 {
        let house = house(Duration::ZERO);
        let registry = Arc::clone(&house.registry);
        let keeper = std::thread::spawn(move || registry.keep_house());
        std::thread::sleep(Duration::from_millis(2));
        house.registry.stop();
        house.registry.end_all();
        let start = Instant::now();
        while !keeper.is_finished() {
            assert!(start.elapsed() < Duration::from_secs(90), "he sleeps on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn checkpoints_have_names_and_an_order() {
    let house = house(Duration::from_secs(60));
    let registry = &house.registry;
    let (_a, one) = house.attach("root@x");
    let names = || {
        let all = registry.checkpoints("@x").unwrap();
        all.into_iter().map(|point| (point.name, point.data)).collect::<Vec<_>>()
    };
    assert_eq!(registry.checkpoint("root@x", "z").unwrap().data, 0);
    write(&one, 7);
    assert_eq!(registry.checkpoint("root@x", "a").unwrap().data, 4096);
    assert_eq!(names(), [("z".into(), 0), ("a".into(), 4096)]);
    registry.rollback("root@x", "z").unwrap();
    assert!(!is_written(&one));
    registry.rollback("root@x", "a").unwrap();
    assert!(is_written(&one));
    registry.reset("root@x").unwrap();
    assert!(!is_written(&one));
    registry.drop_checkpoint("root@x", "z").unwrap();
    registry.checkpoint("root@x", "z").unwrap();
    assert_eq!(names(), [("a".into(), 4096), ("z".into(), 0)]);

    let kind = |result: crate::error::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(registry.checkpoint("root@x", "a").map(drop)), ErrorKind::InUse);
    assert_eq!(kind(registry.checkpoint("root@x", "a b").map(drop)), ErrorKind::Invalid);
    assert_eq!(kind(registry.rollback("root@x", "b")), ErrorKind::NotFound);
    assert_eq!(kind(registry.drop_checkpoint("root@x", "b")), ErrorKind::NotFound);
    for (nobody, why) in [
        ("root@y", ErrorKind::NotFound),
        ("other@x", ErrorKind::NotFound),
        ("nothing@x", ErrorKind::NotFound),
        ("root", ErrorKind::Invalid),
        ("root@x?", ErrorKind::Invalid),
    ] {
        assert_eq!(kind(registry.reset(nobody)), why, "{nobody}");
        assert_eq!(kind(registry.checkpoint(nobody, "b").map(drop)), why, "{nobody}");
    }
    assert_eq!(registry.rollback("root@x", "b").unwrap_err().to_string(), "No such checkpoint: b");
}

#[test]
fn a_fork_is_a_session_of_its_own_with_the_same_owner() {
    let house = house(Duration::from_secs(60));
    let registry = &house.registry;
    let (_a, one) = house.attach("root@x");
    write(&one, 7);
    registry.checkpoint("root@x", "a").unwrap();
    let fork = registry.fork("root@x", "@y", Heir::Owner).unwrap();
    assert_eq!(fork.owner, one.session().owner);
    assert_eq!(registry.checkpoints("root@y").unwrap(), []);
    registry.reset("root@x").unwrap();
    let (_b, two) = house.attach("root@y");
    assert!(is_written(&two) && !is_written(&one));
    assert!(Arc::ptr_eq(two.session(), &fork));

    let kind = |from: &str, to: &str| registry.fork(from, to, Heir::Owner).unwrap_err().kind();
    assert_eq!(kind("root@x", "root@y"), ErrorKind::InUse);
    assert_eq!(kind("root@x", "other@z"), ErrorKind::Invalid);
    assert_eq!(kind("root@x", "root"), ErrorKind::Invalid);
    assert_eq!(kind("root@x", "root@"), ErrorKind::Invalid);
    assert_eq!(kind("root@none", "root@z"), ErrorKind::NotFound);
    assert_eq!(house.registry.named_sessions(), 2);
}
