//! `memdev serve`: offers images until it is told to stop.

mod confine;
mod limits;
mod notify;
mod signals;
mod tls;
mod ways;

use std::ffi::OsString;
use std::io::{self, Write};
use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use memdev::Result;
use memdev::handshake::Knobs;
use memdev::net::Address;
use memdev::overlay::{BlockSize, least_memory};
use memdev::session::Caps;
use memdev::worker::{LockMemory, Memory, Server, ServerConfig, default_budget};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::image::{self, ImageArg};
use super::{Failure, duration, set, size};
use confine::{ConfineArgs, When};
use limits::LimitArgs;
use notify::Notifier;
use signals::Caught;
use tls::{Tls, TlsArgs};
use ways::{Ways, WaysIn};

/// More event loops than this is a slip of the finger: the largest machines have fewer CPUs.
const MAX_WORKERS: u64 = 1024;

/// Offer images to NBD clients, to each its own writable copy
#[derive(Args, Debug)]
#[command(
    long_about = "Offer images to NBD clients, to each its own writable copy, until SIGTERM or SIGINT.\n\n\
        A client that asks for export NAME gets a fresh session: a writable device of its own that starts as a copy of \
        the image and is gone when the client is. A client that asks for NAME@ID gets the named session ID, which is \
        made at first use, shared by all connections that name it, and kept for a while (--linger) after the last of \
        them has closed. The image is never written to; when it is replaced by rename, new sessions get the new one.",
    after_long_help = "Examples:\n  \
        memdev serve root.img\n      \
            on 127.0.0.1:10809; look with: nbdinfo nbd://localhost/root\n\n  \
        memdev serve golden=/srv/debian-12.raw --unix /run/memdev.sock\n      \
            as export 'golden' for this user's processes on this machine:\n      \
            nbdcopy 'nbd+unix:///golden?socket=/run/memdev.sock' copy.img\n\n  \
        memdev serve a.img b.img --tcp '[::]:10809' --insecure \\\n          \
                --memory 16G --session-memory 2G\n      \
            two images for a network that is trusted; all sessions may take 16 GiB,\n      \
            each 2 GiB\n\n  \
        memdev serve root.img --tcp '[::]:10809' \\\n          \
                --tls-certificates /etc/pki/memdev --tls-verify-peer\n      \
            encrypted, and only for clients with a certificate; look with:\n      \
            nbdinfo nbds://HOST/root\n\n\
        Sizes are bytes, or have a unit: 64K, 512M, 8G, 1.5T (all binary, K is 1024).\n\
        Durations are seconds, or have a unit: 500ms, 30s, 2m, 1h."
)]
pub(crate) struct Serve {
    /// Image files, each named by its file stem or by NAME; the first is also the empty export
    ///
    /// An image is a raw disk image or a block device. `root.img` is offered as `root`, `golden=root.img` as `golden`.
    /// A path with a '=' in it is given as NAME=PATH, or with a directory in front (./a=b.img).
    #[arg(value_name = "[NAME=]IMAGE", required = true, value_parser = OsStringValueParser::new().try_map(image_arg))]
    images: Vec<ImageArg>,

    #[command(flatten)]
    ways: Ways,

    /// Memory for what all sessions write [default: half of the machine's]
    ///
    /// A write beyond it fails with "no space left on device", and nothing else is affected; trimming gives memory back.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Keep what sessions write out of swap: where the system lets it be, or the server does not start, or not at all
    ///
    /// Locked memory is limited (ulimit -l, LimitMEMLOCK=) but for root, who may also be root until --user. With `auto` the
    /// server says in one line if the limit is too low for all of --memory, and the machine has swap.
    #[arg(long, value_name = "auto|require|off", value_enum, default_value_t, hide_possible_values = true)]
    lock_memory: When,

    /// Keep what sessions write encrypted in memory, each with a key of its own that is wiped when it ends
    ///
    /// Everything works as it does without, more slowly. 'memdev new --seal' does it for one session.
    #[arg(long)]
    seal: bool,

    /// Let what sessions write grow beyond --memory into a file in DIR, encrypted; needs --seal
    ///
    /// What was not used lately goes there when memory is short, and comes back when it is used. The file has no name, and its
    /// keys are in memory alone: nothing can be read of it when the server has ended, however it ended.
    #[arg(long, value_name = "DIR", requires = "seal")]
    overflow: Option<PathBuf>,

    /// How large that file may become [default: eight times --memory]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "overflow")]
    overflow_size: Option<u64>,

    /// Memory for what one session writes [default: as --memory]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    session_memory: Option<u64>,

    /// Requests a second of one session; 'none': as many as come
    ///
    /// Of all of its connections together. What is asked for beyond it waits, and nobody else is affected; 'memdev set'
    /// changes it for one session.
    #[arg(long, value_name = "N", default_value = "none", value_parser = set::iops)]
    session_iops: u64,

    /// Bytes a second that one session reads and writes; 'none': as many as come
    #[arg(long, value_name = "SIZE", default_value = "none", value_parser = set::bandwidth)]
    session_bandwidth: u64,

    /// Unit in which sessions take memory: a power of two from 4K to 1M
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = block_size)]
    block_size: BlockSize,

    /// How long a named session (NAME@ID) outlives its last connection
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration::parse)]
    linger: Duration,

    /// Threads that serve [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_WORKERS))]
    workers: Option<u64>,

    #[command(flatten)]
    limits: LimitArgs,

    #[command(flatten)]
    tls: TlsArgs,

    #[command(flatten)]
    confine: ConfineArgs,

    // For conformance tests of clients, and of our own fallbacks.
    /// Withhold the handshake flags that are not in BITS (decimal, or hexadecimal with 0x)
    #[arg(long, value_name = "BITS", hide = true, value_parser = bits)]
    mask_handshake: Option<u16>,

    /// Do not offer structured replies, nor extended headers, which take their place
    #[arg(long, hide = true)]
    no_structured_replies: bool,

    /// Do not offer extended headers
    #[arg(long, hide = true)]
    no_extended_headers: bool,
}

pub(crate) fn run(args: Serve) -> Result<(), Failure> {
    image::check_distinct(&args.images).map_err(Failure::Usage)?;
    args.ways.check_distinct().map_err(Failure::Usage)?;
    args.check_memory().map_err(Failure::Usage)?;
    // First of all, while there are neither threads nor descriptors of our own.
    let inherited = args.ways.take_inherited()?;
    let notifier = Notifier::from_environment();
    // From here on a signal ends the server in good order, with its sockets removed.
    let caught = Caught::watch()?;
    raise_limits();
    let tls = args.tls.load()?;
    let confinement = args.confine.confinement()?;
    let mut ways_in = args.ways.open(inherited, &confinement, tls.is_demanded())?;
    let predecessor = ways_in.predecessor.take();
    let takes_over = predecessor.is_some();
    let uris: Vec<String> =
        ways_in.listeners.iter().map(|listener| listener.address().uri(tls.is_demanded())).collect();
    let control = ways_in.control.as_ref().map(|control| control.address().clone());
    let config = args.into_config(ways_in, tls);
    let unwanted = predecessor.as_ref().map_or(&[][..], |predecessor| &predecessor.unwanted);
    // Root may lock as much as it likes, and is not root any more in a moment.
    let memory = Memory::reserve(&config)?;
    // From here on this process has only what it needs to serve: open and read beforehand what else it takes to start.
    let mut entered = confinement.enter(&confine::needs(&config, unwanted))?;
    if config.overflow.is_some() {
        entered.allow_overflow();
    }
    let stop = caught.listen()?;
    let mut report = None;
    let server = Server::start_when(config, memory, |server| {
        report = Some(entered.seal()?);
        // Last of all that could fail, so that until then nothing has happened to the other one.
        predecessor.map_or(Ok(()), |predecessor| predecessor.commit(server))
    })?;
    report.iter().for_each(confine::say);
    for uri in uris {
        // With stderr closed nobody wants to know.
        let _ = writeln!(io::stderr(), "listening on {uri}");
    }
    if let Some(Address::Unix(path)) = control {
        let _ = writeln!(io::stderr(), "control socket at {}", path.display());
    }
    if takes_over {
        notifier.ready_instead();
    } else {
        notifier.ready();
    }
    // Outside of the log's macro, which does not look at its arguments when it has nothing to log.
    let reason = stop.wait(server.over());
    tracing::info!("Stopping on {reason}");
    if !server.registry().gives_way() {
        // Else it is not the service that ends.
        notifier.stopping();
    }
    Ok(server.stop()?)
}

impl Serve {
    /// Refuses so little that every client would be told to wait for others.
    fn check_memory(&self) -> Result<(), String> {
        let least = least_memory(self.block_size);
        match self.memory {
            Some(memory) if memory < least => Err(format!(
                "--memory {memory} is too little: one session with one block takes {} ({least} bytes); give more, such as 512M",
                size::human(least)
            )),
            _ => Ok(()),
        }
    }

    fn into_config(self, ways_in: WaysIn, tls: Tls) -> ServerConfig {
        let cpus = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let all = Knobs::default();
        let memory = self.memory.unwrap_or_else(default_budget);
        let grows = self.overflow.is_some();
        let most_away = self.overflow_size.unwrap_or_else(|| memory.saturating_mul(8));
        ServerConfig {
            images: self.images.into_iter().map(|image| (image.name, image.path)).collect(),
            listeners: ways_in.listeners,
            connections: ways_in.connections,
            workers: self.workers.and_then(|n| usize::try_from(n).ok()).unwrap_or_else(cpus),
            memory: Some(memory),
            lock_memory: match self.lock_memory {
                When::Auto => LockMemory::Auto,
                When::Require => LockMemory::Require,
                When::Off => LockMemory::Off,
            },
            seal: self.seal,
            overflow: self.overflow.map(|dir| (dir, most_away)),
            // One session may have all of both.
            session_memory: self.session_memory.or_else(|| grows.then(|| memory.saturating_add(most_away))),
            session_caps: Caps {
                iops: NonZero::new(self.session_iops),
                bandwidth: NonZero::new(self.session_bandwidth),
            },
            block_size: self.block_size,
            linger: self.linger,
            knobs: Knobs {
                handshake_flags_mask: self.mask_handshake.unwrap_or(all.handshake_flags_mask),
                structured_replies: all.structured_replies && !self.no_structured_replies,
                extended_headers: all.extended_headers && !self.no_extended_headers,
                tls: tls.policy,
            },
            limits: self.limits.into_limits(),
            tls: tls.server,
            control: ways_in.control,
        }
    }
}

/// A connection is a descriptor, and the usual soft limit is 1,024 of them; as low is that of locked memory. The hard limits
/// are the administrator's word.
fn raise_limits() {
    for (resource, what) in [(Resource::Nofile, "open files"), (Resource::Memlock, "locked memory")] {
        let limit = getrlimit(resource);
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(resource, raised) {
            tracing::warn!(%error, "Cannot raise the limit of {what}");
        }
    }
}

fn image_arg(arg: OsString) -> Result<ImageArg, String> {
    ImageArg::parse(arg)
}

fn block_size(text: &str) -> Result<BlockSize, String> {
    let bytes = size::parse(text)?;
    u32::try_from(bytes)
        .ok()
        .and_then(BlockSize::new)
        .ok_or_else(|| "a block size is a power of two from 4K to 1M".to_owned())
}

fn bits(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "not 16 bits; write a number, as 1 or 0x3".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes() {
        assert_eq!(block_size("4K"), Ok(BlockSize::DEFAULT));
        assert_eq!(block_size("1M").map(BlockSize::bytes), Ok(1 << 20));
        for text in ["0", "512", "5000", "2M", "8G", "4294971392", "x"] {
            assert!(block_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn knob_bits() {
        assert_eq!((bits("1"), bits("0x3"), bits("65535")), (Ok(1), Ok(3), Ok(u16::MAX)));
        for text in ["", "65536", "0x10000", "-1", "x"] {
            assert!(bits(text).is_err(), "{text}");
        }
    }

    #[test]
    fn help_states_the_limits_that_hold() {
        assert_eq!((BlockSize::MIN, BlockSize::MAX, BlockSize::DEFAULT.bytes()), (4 << 10, 1 << 20, 4 << 10));
        assert_eq!(memdev::proto::DEFAULT_PORT, 10809);
    }
}
