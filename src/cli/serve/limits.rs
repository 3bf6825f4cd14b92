//! How much of the server clients may have, as it is typed.

use std::time::Duration;

use clap::Args;
use memdev::worker::Limits;

use crate::cli::duration;

/// The shortest time after which a host can be taken for gone: the kernel asks it in whole seconds, three times.
const SHORTEST_SILENCE: Duration = Duration::from_secs(3);

#[derive(Args, Debug)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Connections in all [default: as many as open files allow]
    ///
    /// Whoever comes when there are so many is hung up on.
    #[arg(long, value_name = "N", value_parser = count())]
    max_connections: Option<u64>,

    /// Connections of one user, host, IPv6 network (/64) or virtual machine [default: three times what is left]
    ///
    /// By default nobody can have more than three quarters, so that others always find room.
    #[arg(long, value_name = "N", value_parser = count())]
    max_connections_per_peer: Option<u64>,

    /// Sessions in all [default: 65536, or as many as connections if these are more]
    ///
    /// When there are so many, a client that asks for a new one is refused; it can still enter a named one that is
    /// there. Each also takes 1 KiB of --memory.
    #[arg(long, value_name = "N", value_parser = count())]
    max_sessions: Option<u64>,

    /// Sessions that one user, host, IPv6 network or virtual machine has made [default: three times what is left]
    #[arg(long, value_name = "N", value_parser = count())]
    max_sessions_per_owner: Option<u64>,

    /// Requests in flight on one connection; further ones wait
    ///
    /// A request is in flight from when it is looked at to when the kernel has its reply.
    #[arg(long, value_name = "N", default_value = "1024", value_parser = count())]
    max_requests_in_flight: u64,

    /// Hang up on a client that has not finished its handshake by then; 'off': never
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    handshake_timeout: Timeout,

    /// Hang up on a client that has left a reply unread for so long; 'off': never
    ///
    /// What it does not read is kept for it, in memory. A client that waits for nothing may stay for ever.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = timeout)]
    reply_timeout: Timeout,

    /// Hang up on a TCP client whose host has been silent for so long, though asked; 'off': as the system has it
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = host_timeout)]
    host_timeout: Timeout,
}

/// A time after which something ends, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timeout(Option<Duration>);

impl LimitArgs {
    pub(super) fn into_limits(self) -> Limits {
        let count = |given: Option<u64>| given.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        let in_flight = self.max_requests_in_flight;
        Limits {
            connections: count(self.max_connections),
            connections_per_peer: count(self.max_connections_per_peer),
            sessions: count(self.max_sessions),
            sessions_per_owner: count(self.max_sessions_per_owner),
            requests_in_flight: usize::try_from(in_flight).unwrap_or(usize::MAX),
            handshake: self.handshake_timeout.0,
            unread_reply: self.reply_timeout.0,
            silent_host: self.host_timeout.0,
        }
    }
}

fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..)
}

fn timeout(text: &str) -> Result<Timeout, String> {
    if text == "off" {
        return Ok(Timeout(None));
    }
    let time = duration::parse(text).map_err(|why| format!("{why}, or off"))?;
    Ok(Timeout(Some(time).filter(|time| !time.is_zero())))
}

fn host_timeout(text: &str) -> Result<Timeout, String> {
    match timeout(text)? {
        Timeout(Some(time)) if time < SHORTEST_SILENCE => {
            Err("too short to tell a silent host from a slow one; the shortest is 3s".to_owned())
        }
        timeout => Ok(timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_can_be_off() {
        assert_eq!(timeout("off"), Ok(Timeout(None)));
        assert_eq!(timeout("0"), Ok(Timeout(None)));
        assert_eq!(timeout("250ms"), Ok(Timeout(Some(Duration::from_millis(250)))));
        assert!(timeout("never").unwrap_err().contains("or off"));
        assert_eq!(host_timeout("off"), Ok(Timeout(None)));
        assert_eq!(host_timeout("3s"), Ok(Timeout(Some(SHORTEST_SILENCE))));
        assert!(host_timeout("2s").is_err());
    }

    #[test]
    fn help_states_the_defaults_that_hold() {
        assert_eq!(memdev::limits::REQUESTS, 1024);
        assert_eq!(timeout("10s"), Ok(Timeout(Some(Limits::HANDSHAKE))));
        assert_eq!(timeout("5m"), Ok(Timeout(Some(Limits::UNREAD_REPLY))));
        assert_eq!(host_timeout("30s"), Ok(Timeout(Some(Limits::SILENT_HOST))));
    }
}
