//! The ways to misbehave.

use std::fmt;
use std::str::FromStr;

/// A way to misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Ends in the middle of a conversation: before the first byte, in a header, in an option, in a payload.
    Cut,
    /// Asks for much, takes some of the replies, and resets the connection.
    Reset,
    /// Sends what is no NBD: as flags, as an option, as a request, behind requests.
    Garbage,
    /// Stops in the middle of a conversation, and stays.
    Stall,
    /// Says that it sends no more, in the middle of a conversation, and stays.
    HalfClose,
    /// Sends options or requests as fast as they are taken, and reads the replies or does not.
    Flood,
    /// Announces lengths that are not true.
    Lie,
    /// Asks for more than sockets hold, and never reads a byte of it.
    NeverRead,
    /// Sends its handshake a byte at a time.
    SlowHandshake,
    /// Sends the payload of a write a byte at a time.
    SlowPayload,
    /// Reads its replies a byte at a time.
    SlowReading,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Cut,
        Self::Reset,
        Self::Garbage,
        Self::Stall,
        Self::HalfClose,
        Self::Flood,
        Self::Lie,
        Self::NeverRead,
        Self::SlowHandshake,
        Self::SlowPayload,
        Self::SlowReading,
    ];

    /// As it is typed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Reset => "reset",
            Self::Garbage => "garbage",
            Self::Stall => "stall",
            Self::HalfClose => "half-close",
            Self::Flood => "flood",
            Self::Lie => "lie",
            Self::NeverRead => "never-read",
            Self::SlowHandshake => "slow-handshake",
            Self::SlowPayload => "slow-payload",
            Self::SlowReading => "slow-reading",
        }
    }

    /// Whether it goes on until it is told to end; the others end by themselves.
    #[must_use]
    pub fn stays(self) -> bool {
        !matches!(self, Self::Cut | Self::Reset | Self::Garbage | Self::Lie)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("'{text}' is no way to misbehave; there are {names}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_its_name() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("polite".parse::<Kind>().is_err());
    }
}
