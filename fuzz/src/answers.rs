//! What servers of carried files answer, as XML: reading it ends, and what is understood is no more than there can be.

use std::str;

/// One input: the body of an answer.
pub fn body(data: &[u8]) {
    if let Ok(text) = str::from_utf8(data) {
        memdev::carry::try_answer(text);
    }
}
