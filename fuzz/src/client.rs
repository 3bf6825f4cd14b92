//! The client's side: a server's bytes, whatever they are, to a client that asks for this and that.
//!
//! ```text
//!   | questions 1 | requests 1 | length 1 | cuts 1 | all that the server says ... |
//!   questions   bit 0 list, 1 info, 2 list contexts, 3 set contexts, 4 abort instead of go
//!   requests    bit 0 read, 1 block status, 2 write, 3 flush, 4 trim, 5 write zeroes, 6 cache, 7 a second read
//!   length      of a read, in units of 16 bytes
//! ```
//!
//! A server may say what it likes: the client must come to an end, with an answer or an error, take no more memory than
//! the answer is worth, and give back only what the server has said. It is asked twice, with buffers that hold different
//! bytes before, and must come to the same: what it says was read has been read.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use memdev::client::{Client, Haggling};
use memdev::proto::{ClientFlags, Command, CommandFlags, OptionCode, OptionHeader, Request};
use memdev::{ErrorKind, Result};

/// One input.
pub fn body(data: &[u8]) {
    let Some((script, server)) = data.split_first_chunk::<4>() else { return };
    let (said, talked) = talk(script, server, 0x00);
    assert_eq!(
        talk(script, server, 0xff),
        (said.clone(), talked),
        "what was in a buffer before does not matter"
    );
    check_said(&said);
}

/// A server that says `server` whatever it is asked; what the client said, and what it made of it.
fn talk(script: &[u8; 4], server: &[u8], fill: u8) -> (Vec<u8>, String) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let line =
        Line { server: server.to_vec(), at: 0, most: usize::from(script[3]) + 1, said: Arc::clone(&said) };
    let mut talked = String::new();
    if let Err(error) = play(script, line, fill, &mut talked) {
        // A message is for people and their terminals.
        let message = error.to_string();
        assert!(!message.is_empty() && !message.contains(char::is_control), "{message:?}");
        talked += &message;
    }
    let said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
    (said, talked)
}

/// Asks what `script` says over `transport`, and notes the answers.
///
/// # Errors
/// The first thing that went wrong but for refusals.
pub fn play(
    script: &[u8; 4],
    transport: impl Read + Write + Send + 'static,
    fill: u8,
    notes: &mut String,
) -> Result<()> {
    let [questions, requests, length, _] = *script;
    let mut note = |what: &dyn std::fmt::Debug| *notes += &format!("{what:?}\n");
    let mut haggling = Haggling::over(transport)?;
    note(&haggling.structured_replies());
    if questions & 1 != 0 {
        note(&go_on(haggling.list())?);
    }
    if questions & 2 != 0 {
        note(&go_on(haggling.info("vm"))?);
    }
    if questions & 4 != 0 {
        note(&go_on(haggling.list_meta_contexts("vm", &[]))?);
    }
    if questions & 8 != 0 {
        note(&go_on(haggling.set_meta_contexts("vm", &["base:allocation"]))?);
    }
    if questions & 16 != 0 {
        return haggling.abort();
    }
    let mut client = haggling.go("vm")?;
    note(&(client.export(), client.size(), client.contexts()));
    let length = 16 * usize::from(length);
    for bit in (0..8).filter(|bit| requests & (1 << bit) != 0) {
        note(&go_on(ask(&mut client, bit, length, fill))?);
    }
    client.disconnect()
}

/// Goes on after a refusal, which leaves the stream in step.
fn go_on<T: std::fmt::Debug>(result: Result<T>) -> Result<std::result::Result<T, String>> {
    match result {
        Ok(answer) => Ok(Ok(answer)),
        Err(error) if matches!(error.kind(), ErrorKind::Protocol | ErrorKind::Io) => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

fn ask(client: &mut Client, bit: u8, length: usize, fill: u8) -> Result<String> {
    let asked = u32::try_from(length).expect("a short length");
    match bit {
        0 | 7 => {
            let mut buffer = vec![fill; length];
            client.read(if bit == 0 { 0 } else { 1 << 40 }, &mut buffer)?;
            return Ok(format!("{buffer:02x?}"));
        }
        1 => {
            let extents = client.block_status(4096, asked, CommandFlags::NONE)?;
            let mut at = None;
            for extent in &extents {
                assert!(extent.length > 0);
                let expected = at.filter(|_| extent.context == extents[0].context);
                assert!(expected.is_none_or(|at| at == extent.offset), "extents without a gap");
                at = Some(extent.offset + extent.length);
            }
            return Ok(format!("{extents:?}"));
        }
        2 => client.write(0, &vec![7; length], CommandFlags::FUA)?,
        3 => client.flush()?,
        4 => client.trim(0, asked, CommandFlags::NONE)?,
        5 => client.write_zeroes(0, asked, CommandFlags::NO_HOLE)?,
        _ => client.cache(0, asked)?,
    }
    Ok(String::new())
}

/// All that a client says is what the specification lets it say, whatever it is told.
fn check_said(said: &[u8]) {
    let Some((flags, mut rest)) = said.split_first_chunk::<4>() else { return };
    let known = ClientFlags::FIXED_NEWSTYLE.bits() | ClientFlags::NO_ZEROES.bits();
    assert_eq!(u32::from_be_bytes(*flags) & !known, 0, "client flags");
    let mut is_over = false;
    while let Some((header, behind)) = rest.split_first_chunk::<{ OptionHeader::SIZE }>() {
        let Ok(header) = OptionHeader::parse(header) else { break };
        assert!(!is_over, "nothing behind an abort or a name");
        is_over = matches!(header.option, OptionCode::Abort | OptionCode::ExportName);
        rest = &behind[usize::try_from(header.length).expect("a length")..];
    }
    while let Some((header, behind)) = rest.split_first_chunk::<{ Request::SIZE }>() {
        let request = Request::parse(header).expect("a request");
        let payload = if request.command == Command::Write { request.length } else { 0 };
        rest = &behind[usize::try_from(payload).expect("a length")..];
    }
    assert!(rest.is_empty(), "half a message");
}

/// A connection at whose other end somebody reads from a sheet.
struct Line {
    server: Vec<u8>,
    at: usize,
    /// The most bytes that come at once.
    most: usize,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Read for Line {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.server[self.at..];
        let count = rest.len().min(buffer.len()).min(self.most);
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
