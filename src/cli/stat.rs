//! `memdev stat [SESSION]`: what a session, or a whole server, does and holds.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use memdev::control::model::{Server, SessionDetail};

use super::Failure;
use super::carriers::{self, Carriers, with_carriers};
use super::control::{ControlArgs, age, append_memory, append_traffic, image_of, json, shown};
use super::size::human;

/// Show what a session, or a running server as a whole, does and holds
#[derive(Args, Debug)]
#[command(
    after_help = "Times are from when a request had arrived to when the kernel was given its reply, rounded up to a \
        power of two of microseconds."
)]
pub(crate) struct Stat {
    /// The session, as 'memdev ps' calls it; without, the server
    #[arg(value_name = "SESSION")]
    session: Option<String>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,

    /// Where the private roots of this machine are written down
    #[arg(long, value_name = "DIR", hide = true)]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: &Stat) -> Result<(), Failure> {
    let mut client = args.control.connect()?;
    let text = match &args.session {
        Some(name) => {
            let detail = client.session(name)?;
            let carriers = Carriers::running(args.state.as_deref());
            let uris = &detail.session.uris;
            if args.json {
                json(&with_carriers(&detail, uris, &carriers)?)?
            } else {
                let mut text = session_text(&detail);
                for told in carriers.of_session(uris) {
                    carriers::append(&mut text, told, "    carries ");
                }
                text
            }
        }
        None => {
            let server = client.server()?;
            if args.json { json(&server)? } else { server_text(&server) }
        }
    };
    Ok(super::print(&text)?)
}

fn session_text(detail: &SessionDetail) -> String {
    let SessionDetail { session, peers, latency } = detail;
    let mut out = format!("session: {}\n", shown(&session.name));
    // Writing to a String does not fail.
    let image = image_of(&session.image, &session.base);
    let _ = writeln!(out, "    image: {image}, {}, {}", human(session.size), shown(&session.base.path));
    let owner = session.owner.as_deref().unwrap_or("nobody yet");
    let _ = writeln!(out, "    owner: {}", shown(owner));
    let _ = writeln!(out, "    age: {}", age(session.age_seconds));
    let _ = writeln!(out, "    connections: {}", session.connections);
    for peer in peers {
        let _ = writeln!(out, "        {}", shown(peer));
    }
    for uri in &session.uris {
        let _ = writeln!(out, "    uri: {}", shown(uri));
    }
    if session.sealed {
        out.push_str("    sealed\n");
    }
    append_memory(&mut out, &session.memory);
    if let Some(iops) = session.caps.iops {
        let _ = writeln!(out, "    cap: {iops} requests/s");
    }
    if let Some(bandwidth) = session.caps.bandwidth {
        let _ = writeln!(out, "    cap: {}/s", human(bandwidth));
    }
    append_traffic(&mut out, &session.requests, &session.bytes, latency);
    let rates = &session.rates;
    let _ = writeln!(
        out,
        "    now: {:.1} reads/s, {:.1} writes/s",
        rates.reads_per_second, rates.writes_per_second
    );
    out
}

fn server_text(server: &Server) -> String {
    let mut out = format!("server: memdev {}, pid {}\n", shown(&server.version), server.pid);
    let _ = writeln!(out, "    age: {}", age(server.age_seconds));
    for address in &server.addresses {
        let _ = writeln!(out, "    address: {}", shown(address));
    }
    for image in &server.images {
        let _ = writeln!(out, "    image: {}, {}", shown(&image.name), human(image.size));
    }
    let _ = writeln!(out, "    workers: {}", server.workers);
    let _ = writeln!(out, "    connections: {} of {}", server.connections.now, server.connections.most);
    let _ = writeln!(out, "    sessions: {} of {}", server.sessions.now, server.sessions.most);
    append_memory(&mut out, &server.memory);
    append_traffic(&mut out, &server.requests, &server.bytes, &server.latency);
    out
}
