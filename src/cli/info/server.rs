//! What a server offers. The keys of the JSON are those of `nbdinfo --json`, where it has them.

use std::fmt::Write as _;

use memdev::client::{Export, Haggling};
use memdev::net::Uri;
use memdev::proto::TransmissionFlags as Flags;
use memdev::{ErrorKind, Result};
use serde_json::{Value, json};

use super::{block_sizes_json, block_sizes_text};
use crate::cli::size::human;

/// Every flag: its name for people, and its key in JSON.
const FLAGS: &[(Flags, &str, &str)] = &[
    (Flags::READ_ONLY, "read-only", "is_read_only"),
    (Flags::ROTATIONAL, "rotational", "is_rotational"),
    (Flags::SEND_FLUSH, "flush", "can_flush"),
    (Flags::SEND_FUA, "fua", "can_fua"),
    (Flags::SEND_TRIM, "trim", "can_trim"),
    (Flags::SEND_WRITE_ZEROES, "write-zeroes", "can_zero"),
    (Flags::SEND_FAST_ZERO, "fast-zero", "can_fast_zero"),
    (Flags::SEND_DF, "df", "can_df"),
    (Flags::SEND_CACHE, "cache", "can_cache"),
    (Flags::CAN_MULTI_CONN, "multi-conn", "can_multi_conn"),
    (Flags::SEND_RESIZE, "resize", "can_resize"),
];

/// One export, and the metadata contexts that it has.
struct Entry {
    export: Export,
    contexts: Vec<String>,
}

/// A description of the export that `uri` names, or of all exports if it names none, as text or JSON.
///
/// # Errors
/// Nobody answers, the server refuses, or there is no such export.
pub(super) fn show(uri: &Uri, json: bool) -> Result<String> {
    let mut server = Haggling::connect(uri)?;
    let entries = ask(&mut server, &uri.export)?;
    let (structured, secure) = (server.structured_replies(), server.is_secure());
    // What we came for is here; a server that fails now takes nothing from it.
    let _ = server.abort();
    if json {
        let exports: Vec<Value> = entries.iter().map(Entry::to_json).collect();
        let report = json!({
            "protocol": "newstyle-fixed",
            "TLS": secure,
            "structured": structured,
            "exports": exports,
        });
        return Ok(format!("{report:#}\n"));
    }
    let replies = if structured { "structured" } else { "simple" };
    let (address, tls) = (uri.address.uri(secure), if secure { "with TLS" } else { "without TLS" });
    let mut out = format!("server: {address}\n    protocol: newstyle-fixed {tls}, {replies} replies\n");
    entries.iter().for_each(|entry| entry.append_text(&mut out));
    if entries.is_empty() {
        out.push_str("    lists no exports\n");
    }
    Ok(out)
}

fn ask(server: &mut Haggling, wanted: &str) -> Result<Vec<Entry>> {
    if !wanted.is_empty() {
        return Ok(vec![Entry::ask(server, wanted, "")?]);
    }
    let listed = match server.list() {
        // A server may keep its names to itself and still have a default export.
        Err(error) if matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unsupported) => {
            return Ok(vec![Entry::ask(server, "", "")?]);
        }
        result => result?,
    };
    let mut entries = Vec::new();
    for listed in listed {
        match Entry::ask(server, &listed.name, &listed.description) {
            Ok(entry) => entries.push(entry),
            // It was withdrawn since, or is listed but not for us: the others are worth showing.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Denied) => {
                tracing::warn!(export = listed.name, "{error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(entries)
}

impl Entry {
    fn ask(server: &mut Haggling, name: &str, description: &str) -> Result<Self> {
        let mut export = server.info(name)?;
        if export.description.is_none() && !description.is_empty() {
            export.description = Some(description.to_owned());
        }
        // Without structured replies there are no contexts, and asking for them is not allowed.
        let contexts = if server.structured_replies() {
            server.list_meta_contexts(name, &[]).unwrap_or_default()
        } else {
            Vec::new()
        };
        Ok(Self { export, contexts: contexts.into_iter().map(|context| context.name).collect() })
    }

    fn append_text(&self, out: &mut String) {
        let export = &self.export;
        let shown = |text: &str| text.replace(char::is_control, "\u{fffd}");
        let _ = writeln!(out, "export: '{}'", shown(&export.name));
        if let Some(description) = &export.description {
            let _ = writeln!(out, "    description: {}", shown(description));
        }
        let _ = writeln!(out, "    size: {} ({})", export.size, human(export.size));
        let flags: Vec<_> = FLAGS
            .iter()
            .filter(|(flag, ..)| export.flags.contains(*flag))
            .map(|(_, name, _)| *name)
            .collect();
        let _ = writeln!(out, "    flags: {}", flags.join(" "));
        if let Some(sizes) = export.block_sizes {
            let _ = writeln!(out, "    block sizes: {}", block_sizes_text(sizes));
        }
        if !self.contexts.is_empty() {
            let contexts: Vec<_> = self.contexts.iter().map(|context| shown(context)).collect();
            let _ = writeln!(out, "    contexts: {}", contexts.join(" "));
        }
    }

    fn to_json(&self) -> Value {
        let export = &self.export;
        let mut value = json!({
            "export-name": export.name,
            "description": export.description,
            "export-size": export.size,
            "contexts": self.contexts,
            "block-sizes": export.block_sizes.map(block_sizes_json),
        });
        for &(flag, _, key) in FLAGS {
            value[key] = export.flags.contains(flag).into();
        }
        value
    }
}
