//! The ground that the tests of option haggling share.

use super::server::scratch;
use super::{Image, MIB, Peer, Server};

/// One server with a 1 MiB export "base"; the directory holds the image.
pub fn serve() -> (tempfile::TempDir, Image, Server) {
    let dir = scratch();
    let image = Image::random(dir.path().join("base.img"), MIB, 1);
    let server = Server::of(&image);
    (dir, image, server)
}

/// A connection that has said hello.
pub fn started(server: &Server) -> Peer {
    let mut peer = server.peer();
    peer.start();
    peer
}
