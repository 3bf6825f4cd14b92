//! The ceiling: what a server's socket loop could reach if it had nothing else to do.
//!
//! It has the shape of memdev's own data path (fixed event loops, receive all that arrived, parse all, one vectored
//! send of headers and image data) and nothing else: every read is answered from the image at that offset, every
//! write is received and dropped, no request is checked beyond what keeps the process alive. A ratio to it says how
//! much a real server's sessions, overlay and checks cost.

mod greet;
mod image;
mod worker;

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use memdev::{Error, ErrorKind, Result};
use rustix::net::sockopt;

use self::image::Image;
use self::worker::Worker;
use crate::Ceiling;

/// Serves until it is killed.
pub(crate) fn serve(args: &Ceiling) -> Result<()> {
    let image =
        Image::open(&args.image).map_err(|e| Error::io("Cannot open image", e).on_path(&args.image))?;
    let image = Arc::new(image);
    let workers = (0..args.workers)
        .map(|_| Worker::start(Arc::clone(&image)))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|e| Error::io("Cannot start a worker", e))?;
    let accept = listen(args)?;
    for (worker, number) in workers.iter().cycle().zip(0..) {
        let stream = accept().map_err(|e| Error::io("Cannot accept a connection", e))?;
        // A client that does not get through its handshake is its own problem.
        if let Ok(stream) = greet::greet(stream, image.size()) {
            worker.adopt(number, stream).map_err(|e| Error::io("Cannot watch a connection", e))?;
        }
    }
    Ok(())
}

/// A listener as a function that waits for the next connection.
type Accept = Box<dyn Fn() -> io::Result<OwnedFd>>;

fn listen(args: &Ceiling) -> Result<Accept> {
    match (&args.address.unix, &args.address.tcp) {
        (Some(path), _) => {
            let listener =
                UnixListener::bind(path).map_err(|e| Error::io("Cannot listen on", e).on_path(path))?;
            eprintln!("listening on {}", path.display());
            Ok(Box::new(move || widen(listener.accept()?.0.into())))
        }
        (None, Some(address)) => {
            let listener =
                TcpListener::bind(address).map_err(|e| Error::io("Cannot listen on", e).on(address))?;
            eprintln!("listening on {address}");
            Ok(Box::new(move || {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                widen(stream.into())
            }))
        }
        (None, None) => Err(Error::new(ErrorKind::Invalid, "Neither --unix nor --tcp was given")),
    }
}

/// Makes room for a whole batch of replies in one send; best effort, the system may cap it.
fn widen(stream: OwnedFd) -> io::Result<OwnedFd> {
    let _ = sockopt::set_socket_send_buffer_size(&stream, 2 << 20);
    Ok(stream)
}
