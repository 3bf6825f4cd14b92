//! The ground that the tests of the transmission phase share: an export, both reply styles, and the stream in step.

use super::server::scratch;
use super::{Client, Image, MIB, Server};

/// Bytes in the export.
pub const EXPORT: u64 = 8 * MIB;

/// A server with an 8 MiB export "base" full of data.
pub fn serve() -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 3);
    let server = Server::of(&image);
    (dir, image, server)
}

/// Runs a test with structured and with simple replies, each in a session of its own.
pub fn both(server: &Server, test: impl Fn(&mut Client)) {
    for structured in [true, false] {
        let mut client = if structured { server.client("base") } else { server.simple("base") };
        test(&mut client);
        assert_in_step(&mut client);
        client.disconnect();
    }
}

/// A request after the one under test must be answered properly.
#[track_caller]
pub fn assert_in_step(client: &mut Client) {
    client.write(EXPORT - 3000, b"in step");
    assert_eq!(client.read(EXPORT - 3000, 7), b"in step");
}
