//! What the messages are made of: big-endian numbers, strings with a length before them, sets of flags, open enumerations.

use super::constants::MAX_STRING;

/// Why a payload of the right kind cannot be understood. Its text is fit to be sent to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Malformed {
    /// A length inside the payload reaches beyond its end.
    #[error("data ends too early")]
    Truncated,
    /// Bytes are left behind the last field.
    #[error("data is longer than its contents")]
    TrailingData,
    /// A string is longer than [`MAX_STRING`] bytes.
    #[error("string is longer than 4096 bytes")]
    StringTooLong,
    /// A string is not UTF-8.
    #[error("string is not UTF-8")]
    NotUtf8,
    /// A string contains a NUL character.
    #[error("string contains NUL")]
    ContainsNul,
    /// A number is zero where the specification forbids it, or a list is empty.
    #[error("value must not be zero")]
    Zero,
}

/// `N` bytes at `at` of a message of fixed size; `at + N` must lie within it.
#[inline]
pub(super) const fn field<const N: usize>(message: &[u8], at: usize) -> [u8; N] {
    // Callers pass constants and arrays of constant size, so the check goes away and cannot fail.
    *message.split_at(at).1.first_chunk().expect("a field lies within its message")
}

/// Copies `value` to `at` of a message of fixed size; it must fit.
#[inline]
pub(super) const fn put(message: &mut [u8], at: usize, value: &[u8]) {
    message.split_at_mut(at).1.split_at_mut(value.len()).0.copy_from_slice(value);
}

/// Checks what the specification demands of every string.
///
/// # Errors
/// It is longer than [`MAX_STRING`] bytes, no UTF-8, or contains NUL.
pub fn parse_string(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed::StringTooLong);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::NotUtf8)?;
    if text.contains('\0') { Err(Malformed::ContainsNul) } else { Ok(text) }
}

/// The longest beginning of `text` that may be sent as a string: at most [`MAX_STRING`] bytes, no NUL, whole characters.
pub(crate) fn clip(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The length of an outgoing piece as its 32-bit field. Pieces are built from clipped strings and counted items, far
/// below 4 GiB.
pub(super) fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("an outgoing piece is far below 4 GiB")
}

/// Takes fields off the front of a payload.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(length).ok_or(Malformed::Truncated)?;
        self.0 = rest;
        Ok(head)
    }

    /// A string of `length` bytes.
    pub(super) fn string(&mut self, length: usize) -> Result<&'a str, Malformed> {
        parse_string(self.bytes(length)?)
    }

    /// A string behind its 32-bit length.
    pub(super) fn counted_string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()?;
        self.string(usize::try_from(length).map_err(|_| Malformed::Truncated)?)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::TrailingData) }
    }
}

/// A set of flags as it is on the wire: unknown bits are kept.
macro_rules! wire_flags {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($flag:ident = $constant:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $int);

        impl $name {
            $(
                #[doc = concat!("[`", stringify!($constant), "`](", stringify!($constant), ").")]
                pub const $flag: Self = Self($constant);
            )*
            /// No flag.
            pub const NONE: Self = Self(0);

            /// The bits as they are on the wire.
            #[must_use]
            pub const fn bits(self) -> $int {
                self.0
            }

            /// Whether every flag of `other` is set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The flags of both.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The flags of this set that `other` does not have.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Whether no flag is set.
            #[must_use]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl std::fmt::Debug for $name {
            /// The names of the flags, and in hexadecimal the bits that have none.
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut rest = *self;
                let mut set = f.debug_set();
                $(
                    if self.contains(Self::$flag) {
                        set.entry(&format_args!(stringify!($flag)));
                        rest = rest.without(Self::$flag);
                    }
                )*
                if !rest.is_empty() {
                    set.entry(&format_args!("{:#x}", rest.0));
                }
                set.finish()
            }
        }
    };
}

/// A number on the wire with a name for each known value; others survive as `Other`.
macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($variant:ident = $constant:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $(
                #[doc = concat!("[`", stringify!($constant), "`](", stringify!($constant), ").")]
                $variant,
            )*
            /// A value that the specification does not define.
            Other($int),
        }

        impl From<$int> for $name {
            fn from(value: $int) -> Self {
                match value {
                    $($constant => Self::$variant,)*
                    other => Self::Other(other),
                }
            }
        }

        impl From<$name> for $int {
            fn from(value: $name) -> Self {
                match value {
                    $($name::$variant => $constant,)*
                    $name::Other(other) => other,
                }
            }
        }
    };
}

pub(super) use {wire_enum, wire_flags};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_must_be_utf8_without_nul_and_not_too_long() {
        assert_eq!(parse_string(b""), Ok(""));
        assert_eq!(parse_string("größe".as_bytes()), Ok("größe"));
        assert_eq!(parse_string(b"a\0b"), Err(Malformed::ContainsNul));
        assert_eq!(parse_string(b"\xff"), Err(Malformed::NotUtf8));
        assert_eq!(parse_string(&[b'a'; MAX_STRING]).map(str::len), Ok(MAX_STRING));
        assert_eq!(parse_string(&[b'a'; MAX_STRING + 1]), Err(Malformed::StringTooLong));
    }

    #[test]
    fn what_is_sent_as_a_string_is_clipped_at_a_character() {
        assert_eq!(clip("plain"), "plain");
        assert_eq!(clip("cut\0here"), "cut");
        let long = "ö".repeat(MAX_STRING);
        assert_eq!(clip(&long).len(), MAX_STRING);
        let odd = format!("x{long}");
        assert_eq!(clip(&odd).len(), MAX_STRING - 1);
        assert!(parse_string(clip(&odd).as_bytes()).is_ok());
    }

    #[test]
    fn fields_come_off_the_front_and_never_reach_beyond_the_end() {
        let mut fields = Fields::new(&[0, 1, 0, 0, 0, 2, b'h', b'i', 9]);
        assert_eq!(fields.u16(), Ok(1));
        assert_eq!(fields.counted_string(), Ok("hi"));
        assert_eq!(fields.clone().end(), Err(Malformed::TrailingData));
        assert_eq!(fields.u64(), Err(Malformed::Truncated));
        assert_eq!(fields.rest(), [9]);
        assert_eq!(Fields::new(&[0xff; 4]).counted_string(), Err(Malformed::Truncated));
    }
}
