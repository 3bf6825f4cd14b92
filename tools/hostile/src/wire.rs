//! The bytes of an NBD client: as much of the protocol as it takes to get in.

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_STARTTLS: u32 = 5;
pub(crate) const OPT_INFO: u32 = 6;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;
pub(crate) const OPT_EXTENDED_HEADERS: u32 = 11;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

/// A buffer's length as the wire has it.
fn len32(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

/// The client flags: fixed newstyle, no zeroes.
pub(crate) fn flags() -> Vec<u8> {
    3_u32.to_be_bytes().to_vec()
}

/// An option that tells the truth about its length.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    option_claiming(code, len32(data), data)
}

/// An option that says it has `length` bytes of data.
pub(crate) fn option_claiming(code: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &code.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

/// The data of `INFO` and `GO`, without information requests.
pub(crate) fn info(name: &str) -> Vec<u8> {
    [&len32(name.as_bytes()).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat()
}

/// The data of `SET_META_CONTEXT` for `base:allocation`.
pub(crate) fn contexts(name: &str) -> Vec<u8> {
    let query = b"base:allocation";
    let name = [&len32(name.as_bytes()).to_be_bytes()[..], name.as_bytes()].concat();
    [&name[..], &1_u32.to_be_bytes(), &len32(query).to_be_bytes(), query].concat()
}

/// Everything a client has to say until it is in the transmission phase; the replies need not be waited for.
pub(crate) fn hello(name: &str) -> Vec<u8> {
    [flags(), option(OPT_GO, &info(name))].concat()
}

/// The same with structured replies and `base:allocation`.
pub(crate) fn hello_structured(name: &str) -> Vec<u8> {
    let structured = option(OPT_STRUCTURED_REPLY, &[]);
    [flags(), structured, option(OPT_SET_META_CONTEXT, &contexts(name)), option(OPT_GO, &info(name))].concat()
}

/// The header of a request.
pub(crate) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let fixed = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes()].concat();
    [&fixed[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// A write with its payload.
pub(crate) fn write(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    [&request(WRITE, cookie, offset, len32(data))[..], data].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_sizes_that_the_specification_gives_them() {
        assert_eq!(flags().len(), 4);
        assert_eq!(option(OPT_LIST, b"xyz").len(), 16 + 3);
        assert_eq!(info("name").len(), 4 + 4 + 2);
        assert_eq!(request(READ, 1, 2, 3).len(), 28);
        assert_eq!(write(1, 2, b"four").len(), 28 + 4);
    }
}
