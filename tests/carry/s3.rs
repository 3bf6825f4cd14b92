//! `s3://`: to a server of s3s, on loopback, which keeps objects as files.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use tempfile::TempDir;

use crate::files::attributes_of_a_directory;
use crate::house::House;
use crate::interop_support::{run, said};
use crate::remote::{Server, house, names, what_belongs_to_files};
use crate::servers::{end, free_port, start};
use crate::spool::Small;
use crate::support::server::scratch;
use crate::support::wait_until;

struct S3 {
    dir: TempDir,
    port: u16,
    server: Option<Child>,
}

impl S3 {
    fn new() -> Self {
        let mut this = Self { dir: scratch(), port: free_port(), server: None };
        fs::create_dir_all(this.files()).unwrap();
        this.start();
        this
    }

    fn with(&self, name: &'static str, value: &str) -> Vec<(&'static str, String)> {
        let all = self.environment().into_iter().filter(|(found, _)| *found != name);
        all.chain([(name, value.to_owned())]).collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Server for S3 {
    fn url(&self) -> String {
        "s3://bucket".to_owned()
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_REGION", "eu-test-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", "JOE".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
        ]
    }

    fn files(&self) -> PathBuf {
        self.dir.path().join("root/bucket")
    }

    fn unfinished(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            end(server);
        }
    }

    fn start(&mut self) {
        let mut command = Command::new("memdev-s3-server");
        command.arg(self.port.to_string()).arg(self.dir.path().join("root")).args(["JOE", "secret"]);
        self.server = Some(start(&mut command, &self.dir.path().join("log"), self.port));
    }
}

mod every {
    crate::remote::scenarios!(super::S3::new());
}

#[test]
fn s3_what_belongs_to_files() {
    let made = "printf x >'\u{e4} a+b'; perl -e '($f, $n, $v) = (\"root\", \"user.a b\", \"1 = 2\"); syscall(188, $f, $n, $v, 5, 0)'";
    let found = "test $(cat '\u{e4} a+b') = x; \
                 test \"$(perl -e '($f, $n, $v) = (\"root\", \"user.a b\", \"-\" x 9); print substr($v, 0, syscall(191, $f, $n, $v, 9))')\" = '1 = 2'";
    // In parts.
    what_belongs_to_files(&S3::new(), 20, made, found);
}

#[test]
fn s3_attributes_of_directories() {
    let server = S3::new();
    attributes_of_a_directory(|| house(&server));
}

#[test]
fn s3_prefixes_are_apart() {
    let server = S3::new();
    let at = |prefix: &str| House::at(&format!("s3://bucket/{prefix}"), &server.environment());
    at("a").sh(&[], "echo 1 >x; mkdir d; echo 2 >d/y");
    at("ab/c").sh(&["--carry-deletes"], "test ! -e x; echo 3 >x");
    at("a/").sh(&["--carry-deletes"], "test $(cat x d/y | tr -d '\\n') = 12; rm x");
    assert_eq!(names(&server), ["a/", "a/d/", "a/d/y", "ab/", "ab/c/", "ab/c/x"]);
}

/// More objects than a page of a listing has.
#[test]
fn s3_many_files() {
    let server = S3::new();
    for n in 0..1_030 {
        fs::write(server.files().join(format!("f{n}")), "x").unwrap();
    }
    house(&server).sh(&[], "test $(ls | wc -l) = 1030 && test $(cat f* | tr -d '\\n' | wc -c) = 1030");
}

#[test]
fn s3_that_is_full() {
    let server = S3::new();
    // With what is not whole yet.
    let small = Small::at(server.unfinished(), "1m");
    fs::create_dir(server.files()).unwrap();
    let house = house(&server);
    let running = house.start(&[], "head -c 3000000 /dev/urandom >big; sha256sum big >sum; sleep 1000");
    wait_until("it has failed", || house.status()["running"][0]["last_error"].is_string());
    assert!(!server.files().join("big").exists());
    run("mount", ["-o", "remount,size=8m", server.unfinished().to_str().unwrap()]);
    wait_until("it is delivered", || {
        server.files().join("big").metadata().is_ok_and(|file| file.len() == 3_000_000)
    });
    drop(running);
    wait_until("it is over", || house.status()["running"].as_array().unwrap().is_empty());
    assert!(house.spooled().is_empty());
    drop(small);
}

#[test]
fn s3_that_cannot_be_used_lets_nobody_in() {
    let mut server = S3::new();
    let attempt = |url: &str, environment: &[(&'static str, String)], expected: &str| {
        let output = House::at(url, environment).attempt(&[], "echo inside");
        let said = said(&output);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{said}");
        let is_line = said.trim_end().lines().count() == 1;
        assert!(said.to_lowercase().contains(expected) && is_line, "{url}: {said}");
    };
    let environment = server.environment();
    attempt("s3://nothing", &environment, "nosuchbucket");
    attempt("s3://bucket/../x", &environment, "its prefix has '.', '..' or an empty name");
    attempt("s3://Bucket/x", &environment, "its bucket is none");
    attempt(
        "s3://bucket",
        &server.with("AWS_SECRET_ACCESS_KEY", "wrong"),
        "the server does not accept the credentials",
    );
    attempt(
        "s3://bucket",
        &server.with("AWS_ACCESS_KEY_ID", "EVE"),
        "the server does not accept the credentials",
    );
    attempt("s3://bucket", &server.with("AWS_ENDPOINT_URL", "localhost"), "aws_endpoint_url is no address");
    let none = server.dir.path().join("none");
    let mut without = server.with("AWS_SECRET_ACCESS_KEY", "");
    without.push(("AWS_SHARED_CREDENTIALS_FILE", none.to_str().unwrap().to_owned()));
    attempt("s3://bucket", &without, "there are no keys");
    fs::write(&none, "[default]\naws_access_key_id = JOE\naws_secret_access_key = secret\n").unwrap();
    House::at("s3://bucket", &without).sh(&[], "echo 1 >x");
    assert_eq!(names(&server), ["x"]);
    server.stop();
    attempt("s3://bucket", &environment, "connection refused");
}
