//! Records what real clients and servers say, as seeds.
//!
//! ```text
//!   record relay SOCKET SERVER FOLDER     listens on SOCKET, passes on to SERVER; each connection becomes FOLDER/N.client
//!                                         and FOLDER/N.server, until the process is ended
//!   record ask SERVER SCRIPT FILE         asks SERVER what SCRIPT says (eight hexadecimal digits: the first four bytes of
//!                                         an input of target `client`), and makes such an input of it
//! ```
//!
//! SOCKET and SERVER are paths of unix sockets. What a client says behind its goodbye is not kept.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["relay", socket, server, folder] => relay(Path::new(socket), Path::new(server), Path::new(folder)),
        ["ask", server, script, file] => ask(Path::new(server), script, Path::new(file)),
        _ => {
            Err(io::Error::other("usage: record relay SOCKET SERVER FOLDER | record ask SERVER SCRIPT FILE"))
        }
    }
}

fn relay(socket: &Path, server: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let listener = UnixListener::bind(socket)?;
    for number in 1.. {
        let (client, _) = listener.accept()?;
        let server = UnixStream::connect(server)?;
        let file = |end: &str| folder.join(format!("{number}.{end}"));
        pump(client.try_clone()?, server.try_clone()?, file("client"));
        pump(server, client, file("server"));
    }
    Ok(())
}

/// Passes on what comes, and keeps it.
fn pump(mut from: UnixStream, mut to: UnixStream, file: PathBuf) {
    thread::spawn(move || -> io::Result<()> {
        let (mut kept, mut buffer) = (fs::File::create(file)?, vec![0; 1 << 16]);
        while let count @ 1.. = from.read(&mut buffer)? {
            kept.write_all(&buffer[..count])?;
            to.write_all(&buffer[..count])?;
        }
        to.shutdown(Shutdown::Write)
    });
}

/// A connection that keeps what the server says.
struct Kept(UnixStream, Arc<Mutex<Vec<u8>>>);

impl Read for Kept {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.lock().expect("nobody panics").extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn ask(server: &Path, script: &str, file: &Path) -> io::Result<()> {
    let script = u32::from_str_radix(script, 16).map_err(io::Error::other)?.to_be_bytes();
    let said = Arc::new(Mutex::new(Vec::new()));
    let mut notes = String::new();
    let line = Kept(UnixStream::connect(server)?, Arc::clone(&said));
    let result = memdev_fuzz::client::play(&script, line, 0, &mut notes);
    print!("{notes}");
    if let Err(error) = result {
        println!("{error}");
    }
    let said = said.lock().expect("nobody panics").clone();
    fs::write(file, [&script[..], &said].concat())
}
