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
use std::sync::Arc;

use memdev::net::Listener;
use memdev::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};

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
    let listener = Listener::bind(&args.place.address()?)?;
    eprintln!("listening on {}", listener.uri());
    accept(&listener, &image, &workers)
        .map_err(|e| Error::io("Cannot accept a connection on", e).on(listener.uri()))
}

fn accept(listener: &Listener, image: &Image, workers: &[Worker]) -> io::Result<()> {
    let mut turns = workers.iter().cycle().zip(0..);
    loop {
        let Some(stream) = listener.accept()? else {
            poll(&mut [PollFd::new(listener, PollFlags::IN)], None)?;
            continue;
        };
        // A client that does not get through its handshake is its own problem.
        if greet::greet(&stream, image.size()).is_ok()
            && let Some((worker, number)) = turns.next()
        {
            worker.adopt(number, stream)?;
        }
    }
}
