//! A device, with all that it stands on, in a process of its own.

// Not every bench uses all of it.
#![allow(dead_code, reason = "shared by several benches")]

use memdev::base::Image;
use memdev::cow::{Device, Piece};
use memdev::overlay::{BlockSize, Budget, Magazine, Overlay, Pool};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use tempfile::NamedTempFile;

/// Bytes of the benched image: more than the caches hold, little enough for any machine.
pub(crate) const SIZE: u64 = 128 << 20;
/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks of the benched image: a power of two.
pub(crate) const BLOCKS: u64 = SIZE / BLOCK;

/// An image without holes.
#[must_use]
pub(crate) fn image_file() -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    let piece: Vec<u8> = (0..1 << 20).map(|i: u32| u8::try_from(i % 251).expect("below 251") | 1).collect();
    for _ in 0..SIZE >> 20 {
        file.write_all(&piece).expect("room for the image");
    }
    file
}

/// The image at `path`, all of it in memory.
#[must_use]
pub(crate) fn warm_image(path: &Path) -> Arc<Image> {
    let image = Image::open(path).expect("an image");
    image.warm(0..SIZE).expect("an image that can be read");
    Arc::new(image)
}

/// Block memory, and the helper that keeps it ready.
pub(crate) struct Memory {
    pub(crate) pool: Arc<Pool>,
    pub(crate) total: Arc<Budget>,
    tender: Option<JoinHandle<()>>,
}

impl Memory {
    #[must_use]
    pub(crate) fn new() -> Self {
        let pool = Pool::new(4 * SIZE, BlockSize::DEFAULT).expect("address space");
        let tender = std::thread::spawn({
            let pool = Arc::clone(&pool);
            move || pool.tend()
        });
        Self { pool, total: Budget::total(4 * SIZE), tender: Some(tender) }
    }

    /// The private half of a new device.
    #[must_use]
    pub(crate) fn overlay(&self) -> Overlay {
        Overlay::new(
            BLOCKS,
            Arc::clone(&self.pool),
            Budget::within(&self.total, 2 * SIZE).expect("the total is larger"),
        )
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.pool.stop();
        if let Some(tender) = self.tender.take() {
            tender.join().expect("the tender does not panic");
        }
    }
}

/// A device over a warm image.
pub(crate) struct Store {
    pub(crate) device: Device,
    pub(crate) magazine: Magazine,
    memory: Memory,
    _file: NamedTempFile,
}

impl Store {
    #[must_use]
    pub(crate) fn new() -> Self {
        let (file, memory) = (image_file(), Memory::new());
        let magazine = Magazine::new(Arc::clone(&memory.pool));
        let device = Device::new(warm_image(file.path()), memory.overlay());
        Self { device, magazine, memory, _file: file }
    }

    /// A fresh device; the memory of the one before goes back first.
    pub(crate) fn renew(&mut self) {
        self.device.trim(&(0..SIZE), &mut self.magazine);
        self.magazine.flush();
        self.device = Device::new(Arc::clone(self.device.image()), self.memory.overlay());
    }

    /// Writes data without zeroes.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.write(offset, data, &mut self.magazine).expect("memory for the write");
    }

    /// Reads as a transmission does: looks where the bytes are, holds them, lets go of them.
    pub(crate) fn read(&mut self, offset: u64, length: u64) -> usize {
        let (mut pieces, mut found) = (0, Vec::new());
        self.device.read(offset..offset + length, |piece| {
            pieces += 1;
            if let Piece::Blocks { run, .. } = piece {
                found.push(run);
            }
        });
        for run in found {
            self.device.release(run, &mut self.magazine);
        }
        pieces
    }
}

/// The `turn`th of `places` places in an order that jumps about; `places` is a power of two.
#[must_use]
pub(crate) fn scattered(turn: u64, places: u64) -> u64 {
    turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) % places
}
