//! What servers of carried files answer, as XML or as a message of SFTP: reading it ends, and what is understood is no more than
//! there can be.

/// One input: the body of an answer, or a message.
pub fn body(data: &[u8]) {
    memdev::carry::try_answer(data);
}
