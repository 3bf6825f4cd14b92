//! The ground that the tests of the transmission phase share: an export, every style of headers, and the stream in step.

use super::server::scratch;
use super::{Client, Image, MIB, Server, Style};

/// Bytes in the export.
pub const EXPORT: u64 = 8 * MIB;

/// A server with an 8 MiB export "base" full of data.
pub fn serve() -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), EXPORT, 3);
    let server = Server::of(&image);
    (dir, image, server)
}

/// Runs a test with structured and simple replies and with extended headers, each in a session of its own.
pub fn every_style(server: &Server, test: impl Fn(&mut Client)) {
    for style in Style::ALL {
        let mut client = server.client_in(style, "base");
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
