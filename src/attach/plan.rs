//! What is about to be made: everything that can be known and opened before the kernel is asked for anything.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::control::Told;
use super::device::{Device, SECTOR};
use super::record::{Directory, Entry, Record};
use super::{Options, Source, random_name};
use crate::base::Image;
use crate::client;
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Address, Uri};
use crate::proto::TransmissionFlags;

/// An attachment that is being made.
pub(super) struct Plan<'a> {
    pub(super) options: &'a Options,
    pub(super) directory: &'a Directory,
    pub(super) entry: &'a Entry,
    /// The device that was asked for.
    pub(super) wanted: Option<Device>,
    /// The image's path, or the URI.
    pub(super) source: String,
    /// The export, with the session's id if it has one.
    pub(super) export: String,
    /// What a running server told of it; for an image the daemon tells.
    pub(super) told: Option<Told>,
    pub(super) image: Option<File>,
}

impl Plan<'_> {
    /// Whether every connection to the export sees the same disk, as the running server told.
    pub(super) fn is_shared(&self) -> bool {
        self.told.is_some_and(|told| told.flags.contains(TransmissionFlags::CAN_MULTI_CONN))
    }

    /// What is written down of it, once it is known what is served.
    ///
    /// # Errors
    /// There is not one whole sector, or no sector is large enough for the server.
    pub(super) fn record(&self, backend: &str, told: Told, pid: u32) -> Result<Record> {
        if told.minimum > largest_sector() {
            let why = format!(
                "Export '{}' takes no requests of less than {} bytes, and devices have sectors of {} at most",
                self.export,
                told.minimum,
                largest_sector()
            );
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        if told.size < SECTOR {
            let (what, advice) = match &self.options.source {
                // Nobody has heard of the export that it becomes.
                Source::Image { path, .. } => {
                    (format!("Image {}", path.display()), "give the path of a raw disk image")
                }
                Source::Export(uri) => {
                    (format!("Export '{}' of {}", self.export, uri.address), "give another one")
                }
            };
            let why = format!("{what} has less than one sector of {SECTOR} bytes");
            return Err(Error::new(ErrorKind::Invalid, why).advise(advice));
        }
        Ok(Record {
            device: String::new(),
            backend: backend.to_owned(),
            source: self.source.clone(),
            export: self.export.clone(),
            size: told.size / SECTOR * SECTOR,
            read_only: self.options.read_only || told.flags.contains(TransmissionFlags::READ_ONLY),
            connections: self.options.connections,
            pid,
            root: self.options.root.clone(),
        })
    }
}

/// The size of the device's sectors in bytes: 512, what file systems and partition tables in images are made for, unless
/// the server cannot take so small a request and says so.
pub(super) fn block_size(told: Told) -> u32 {
    told.minimum.max(1).next_power_of_two().clamp(512, largest_sector())
}

/// The largest sectors that every kernel has, in bytes.
fn largest_sector() -> u32 {
    u32::try_from(rustix::param::page_size()).unwrap_or(4096)
}

/// What a source is called, and what was opened of it.
pub(super) struct Opened {
    pub(super) source: String,
    pub(super) export: String,
    pub(super) told: Option<Told>,
    pub(super) image: Option<File>,
    /// The connections to a running server; none for an image, which the daemon serves.
    pub(super) sockets: Vec<OwnedFd>,
}

/// Opens what is to be attached: the image, or as many connections to the export as are asked for.
///
/// # Errors
/// What is wrong with the image, or what the server says.
pub(super) fn open(options: &Options) -> Result<Opened> {
    match &options.source {
        Source::Image { name, path } => {
            let path = std::path::absolute(path)
                .map_err(|error| Error::io("Cannot resolve the path of image", error).on_path(path))?;
            // Everything that can be wrong with an image is found out, and said, here.
            Image::open(&path)?;
            let image =
                File::open(&path).map_err(|error| Error::io("Cannot open image", error).on_path(&path))?;
            let export = format!("{name}@{}", random_name()?);
            let source = path.display().to_string();
            Ok(Opened { source, export, told: None, image: Some(image), sockets: Vec::new() })
        }
        Source::Export(uri) => {
            if uri.tls.is_some() {
                // What asks for TLS must not go on without.
                let why = format!("No TLS for block devices, as {uri} asks for");
                return Err(Error::new(ErrorKind::Unsupported, why)
                    .advise("use a unix socket, or a network that only these machines are on, and nbd://"));
            }
            let mut sockets = Vec::new();
            let mut first = None;
            for _ in 0..options.connections {
                let (socket, export) = client::open_simple(&uri.address, &uri.export)?;
                let shared = export.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
                if options.connections > 1 && !shared {
                    // Each would be a copy of its own, behind one device.
                    let why = format!("Export '{}' cannot have several connections", uri.export);
                    return Err(Error::new(ErrorKind::Invalid, why)
                        .advise("name a session, as NAME@ID, or leave out --connections"));
                }
                sockets.push(socket);
                first.get_or_insert(export);
            }
            let told = first.as_ref().map(Told::of_export);
            let name = first.map_or_else(String::new, |export| export.name);
            // What was asked for names the session; what the server answers may be the image alone.
            let export = if uri.export.is_empty() { name } else { uri.export.clone() };
            Ok(Opened { source: absolute(uri).to_string(), export, told, image: None, sockets })
        }
    }
}

/// The URI as it leads to the server from any directory.
fn absolute(uri: &Uri) -> Uri {
    let mut uri = uri.clone();
    if let Address::Unix(path) = &mut uri.address
        && let Ok(absolute) = std::path::absolute(&*path)
    {
        *path = absolute;
    }
    uri
}
