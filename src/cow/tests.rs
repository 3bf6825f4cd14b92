//! The device against a byte array, and its promises one by one.

use super::*;
use crate::overlay::Pool;
use proptest::prelude::*;
use std::io::Write;

struct Fixture {
    device: Device,
    magazine: Magazine,
    _file: tempfile::NamedTempFile,
}

fn fixture(base: &[u8], limit: u64) -> Fixture {
    fixture_of(base, limit, false)
}

fn fixture_of(base: &[u8], limit: u64, sealed: bool) -> Fixture {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(base).unwrap();
    let image = Arc::new(Image::open(file.path()).unwrap().untold());
    let pool = Pool::new(64 << 20, BlockSize::DEFAULT).unwrap();
    let magazine = Magazine::new(Arc::clone(&pool));
    let blocks = BlockSize::DEFAULT.blocks_for(image.size());
    let overlay = overlay(blocks, &pool, Budget::within(&Budget::total(64 << 20), limit).unwrap(), sealed);
    Fixture { device: Device::new(image, overlay), magazine, _file: file }
}

/// One that is sealed, or is not.
pub(super) fn overlay(blocks: u64, pool: &Arc<Pool>, budget: Budget, sealed: bool) -> Overlay {
    match sealed {
        true => Overlay::sealed(blocks, Arc::clone(pool), budget, pool.keys().unwrap().make().unwrap()),
        false => Overlay::new(blocks, Arc::clone(pool), budget),
    }
}

pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap() | 1).collect()
}

impl Fixture {
    fn read(&mut self, range: Range<u64>) -> Vec<u8> {
        let (device, magazine) = (&self.device, &mut self.magazine);
        let mut out = Vec::new();
        device.read(range, |piece| match piece {
            Piece::Base { offset, len } => {
                let mut bytes = vec![0; len];
                device.image().read_at(offset, &mut bytes).unwrap();
                out.extend(bytes);
            }
            Piece::Blocks { run, first, at, len } => {
                let start = out.len();
                out.resize(start + len, 0);
                device.copy(&run, first, at, &mut out[start..]);
                device.release(run, magazine);
            }
            Piece::Zero { len } => out.resize(out.len() + len, 0),
        });
        out
    }

    /// Length and kind (hole, dirty) of what makes up `range`; neighbours of one kind are merged.
    fn extents(&self, range: Range<u64>) -> Vec<(u64, bool, bool)> {
        let mut all: Vec<(u64, bool, bool)> = Vec::new();
        self.device.extents(range, |Extent { len, hole, dirty }| {
            match all.last_mut() {
                Some(last) if (last.1, last.2) == (hole, dirty) => last.0 += len,
                _ => all.push((len, hole, dirty)),
            }
            true
        });
        all
    }

    fn receive(&mut self, offset: u64, data: &[u8], pieces: &[usize]) {
        let mut incoming = Incoming::new(offset..offset + data.len() as u64);
        let (mut rest, mut pieces) = (data, pieces.iter().copied().cycle());
        while incoming.missing() > 0 {
            incoming.open_window(&self.device, &mut self.magazine).unwrap();
            let len = pieces.next().unwrap_or(1).clamp(1, rest.len());
            let taken = incoming.take(&rest[..len], &self.device);
            rest = &rest[taken..];
            incoming.close_window(&self.device, &mut self.magazine).unwrap();
        }
        for fragment in incoming.finish().fragments {
            self.device.write(fragment.offset, &fragment.data, &mut self.magazine).unwrap();
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Receive(u64, u64, u8, usize),
    WriteZeroes(u64, u64, bool),
    Trim(u64, u64),
}

const SIZE: usize = 40 * 4096 + 123;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let size = SIZE as u64;
    let range = prop_oneof![
        (0..size, 1..3 * 4096_u64),
        (0..40_u64, 1..9_u64).prop_map(|(block, count)| (block * 4096, count * 4096)),
    ]
    .prop_map(move |(start, len)| (start, len.min(size - start)));
    let op = prop_oneof![
        (range.clone(), 0..4_u8).prop_map(|((start, len), value)| Op::Write(start, len, value)),
        (range.clone(), 0..4_u8, 1..9000_usize)
            .prop_map(|((start, len), value, piece)| Op::Receive(start, len, value, piece)),
        (range.clone(), any::<bool>())
            .prop_map(|((start, len), allocate)| Op::WriteZeroes(start, len, allocate)),
        range.prop_map(|(start, len)| Op::Trim(start, len)),
    ];
    prop::collection::vec(op, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_device_is_a_byte_array(ops in ops(), sealed in any::<bool>()) {
        let mut model = pattern(SIZE);
        let mut fixture = fixture_of(&model, 1 << 30, sealed);
        for op in ops {
            let device = &fixture.device;
            match op {
                Op::Write(start, len, value) => {
                    let range = clamp(start)..clamp(start + len);
                    model[range.clone()].fill(value);
                    device.write(start, &model[range], &mut fixture.magazine).unwrap();
                }
                Op::Receive(start, len, value, piece) => {
                    let range = clamp(start)..clamp(start + len);
                    model[range.clone()].fill(value);
                    let data = model[range].to_vec();
                    fixture.receive(start, &data, &[piece, 17]);
                }
                Op::WriteZeroes(start, len, allocate) => {
                    model[clamp(start)..clamp(start + len)].fill(0);
                    device.write_zeroes(start..start + len, allocate, &mut fixture.magazine).unwrap();
                }
                Op::Trim(start, len) => {
                    device.trim(&(start..start + len), &mut fixture.magazine);
                    let whole = device.whole_blocks(&(start..start + len));
                    let end = clamp(whole.end * 4096).min(SIZE);
                    model[clamp(whole.start * 4096).min(end)..end].fill(0);
                }
            }
            prop_assert!(fixture.read(0..SIZE as u64) == model);
        }
        let mut at = 0;
        let base = pattern(SIZE);
        for (len, hole, dirty) in fixture.extents(0..SIZE as u64) {
            let here = at..at + clamp(len);
            prop_assert!(!hole || model[here.clone()].iter().all(|&byte| byte == 0));
            prop_assert!(dirty || model[here.clone()] == base[here]);
            at += clamp(len);
        }
        prop_assert_eq!(at, SIZE);
    }
}

#[test]
fn holes_of_the_base_and_zeroes_of_the_overlay_are_holes() {
    let mut fixture = fixture(&pattern(64 * 4096), 1 << 30);
    fixture.device.write_zeroes(4096..3 * 4096, false, &mut fixture.magazine).unwrap();
    fixture.device.write(5 * 4096, &[1; 4096], &mut fixture.magazine).unwrap();
    let block = |count: u64, hole, dirty| (count * 4096, hole, dirty);
    assert_eq!(
        fixture.extents(0..8 * 4096),
        [
            block(1, false, false),
            block(2, true, true),
            block(2, false, false),
            block(1, false, true),
            block(2, false, false)
        ]
    );
    assert_eq!(fixture.extents(4096 + 7..4096 + 9), [(2, true, true)]);
}

#[test]
fn extents_stop_when_told_to() {
    let mut fixture = fixture(&pattern(64 * 4096), 1 << 30);
    for block in (0..64).step_by(2) {
        fixture.device.trim(&(block * 4096..(block + 1) * 4096), &mut fixture.magazine);
    }
    let mut seen = 0;
    fixture.device.extents(0..64 * 4096, |_| {
        seen += 1;
        seen < 3
    });
    assert_eq!(seen, 3);
}

#[test]
fn zeroing_what_is_zero_costs_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let image = Arc::new(Image::open(file.path()).unwrap());
    let pool = Pool::new(1 << 20, BlockSize::DEFAULT).unwrap();
    let mut magazine = Magazine::new(Arc::clone(&pool));
    let overlay = Overlay::new(1 << 28, pool, Budget::within(&Budget::total(1 << 20), 1 << 20).unwrap());
    let device = Device::new(image, overlay);
    device.trim(&(0..1 << 40), &mut magazine);
    device.write_zeroes(5..(1 << 40) - 5, false, &mut magazine).unwrap();
    assert_eq!((device.overlay().budget().map(), device.overlay().budget().data()), (0, 0));

    // A look at all of it is a look at what was written: three blocks, and the stretches between them.
    for at in [0, 1 << 39, (1 << 40) - 4096] {
        device.write(at, &[1; 4096], &mut magazine).unwrap();
    }
    let mut seen = Vec::new();
    device.extents(0..1 << 40, |extent| {
        seen.push((extent.len, extent.dirty));
        true
    });
    let clean: Vec<_> = seen.iter().filter(|(_, dirty)| !dirty).map(|(len, _)| *len).collect();
    assert!(seen.len() < 10, "{seen:?}");
    assert_eq!(clean.iter().sum::<u64>(), (1 << 40) - 3 * 4096);
    assert_eq!(device.leading_hole(0..1 << 40), 0);
    assert_eq!(device.leading_hole(4096..1 << 40), (1 << 39) - 4096);
}

#[test]
fn allocated_zeroes_take_memory_and_later_writes_succeed() {
    let mut fixture = fixture(&pattern(64 * 4096), 4 * 4096);
    fixture.device.write_zeroes(0..4 * 4096, true, &mut fixture.magazine).unwrap();
    assert!(fixture.device.write(4 * 4096, &[1; 4096], &mut fixture.magazine).is_err());
    fixture.device.write(0, &[1; 4 * 4096], &mut fixture.magazine).unwrap();
    assert_eq!(fixture.extents(0..4096), [(4096, false, true)]);
}

#[test]
fn a_cold_base_is_needed_by_reads_and_by_edges_of_writes_only() {
    let mut fixture = fixture(&pattern(256 * 4096), 1 << 30);
    let device = &fixture.device;
    assert_eq!(device.read_needs(&(10..20)), Some(10..20));
    assert_eq!(device.write_needs(&(4096..3 * 4096)), None);
    assert_eq!(device.write_needs(&(4096..3 * 4096 + 1)), Some(3 * 4096..4 * 4096));
    assert_eq!(device.write_needs(&(4095..3 * 4096)), Some(0..4096));
    device.write(0, &[1; 4096], &mut fixture.magazine).unwrap();
    assert_eq!(device.read_needs(&(10..20)), None);
    assert_eq!(device.write_needs(&(10..20)), None);
    device.image().warm(0..256 * 4096).unwrap();
    assert_eq!(device.read_needs(&(0..256 * 4096)), None);
}

#[test]
fn an_abandoned_write_never_happened() {
    let base = pattern(64 * 4096);
    let mut fixture = fixture(&base, 1 << 30);
    let mut incoming = Incoming::new(100..40_000);
    incoming.open_window(&fixture.device, &mut fixture.magazine).unwrap();
    incoming.take(&[9; 30_000], &fixture.device);
    incoming.close_window(&fixture.device, &mut fixture.magazine).unwrap();
    incoming.abandon(&fixture.device, &mut fixture.magazine);
    assert!(fixture.read(0..64 * 4096) == base);
    assert_eq!(fixture.device.overlay().budget().data(), 0);
}

#[test]
fn a_base_that_fails_under_a_partial_write_is_an_error() {
    let mut fixture = fixture(&pattern(64 * 4096), 1 << 30);
    fixture._file.as_file().set_len(4096).unwrap();
    assert_eq!(fixture.device.write(5 * 4096, &[1; 10], &mut fixture.magazine), Err(ErrorKind::Io));
    fixture.device.write(5 * 4096, &[1; 4096], &mut fixture.magazine).unwrap();
    fixture.device.write(5 * 4096 + 1, &[2; 10], &mut fixture.magazine).unwrap();
}

/// What is in memory for the blocks `blocks`, one after the other.
fn in_memory(device: &Device, blocks: Range<u64>) -> Vec<u8> {
    let mut all = Vec::new();
    device.overlay().for_runs(blocks, |_, content| {
        if let Content::Allocated(slots) = content {
            let arena = device.overlay().pool().arena();
            slots.iter().for_each(|slot| all.extend_from_slice(arena.bytes(slot)));
        }
    });
    all
}

#[test]
fn what_is_sealed_is_noise_in_memory_and_equal_blocks_differ() {
    const MARKER: [u8; 32] = *b"not to be found in block memory!";
    let data = MARKER.repeat(128);
    let has_marker = |bytes: &[u8]| bytes.windows(32).any(|window| window == MARKER);
    for sealed in [false, true] {
        let mut fixture = fixture_of(&pattern(64 * 4096), 1 << 30, sealed);
        let (device, magazine) = (&fixture.device, &mut fixture.magazine);
        for block in 0..3 {
            device.write(block * 4096, &data, magazine).unwrap();
        }
        // Parts: over the base, over zeroes, over what is there, and in memory that was given ahead.
        device.write(4 * 4096 + 33, &MARKER, magazine).unwrap();
        device.write_zeroes(5 * 4096..6 * 4096, false, magazine).unwrap();
        device.write(5 * 4096 + 100, &MARKER, magazine).unwrap();
        device.write(4 * 4096 + 1000, &MARKER, magazine).unwrap();
        device.write_zeroes(6 * 4096..7 * 4096, true, magazine).unwrap();
        // A reply holds the block that is written to.
        let mut held = Vec::new();
        device.read(0..4096, |piece| held.push(piece));
        device.write(7, &MARKER, magazine).unwrap();
        fixture.receive(8 * 4096, &data.repeat(3), &[1000]);
        let memory = in_memory(&fixture.device, 0..64);
        assert_eq!(memory.len(), 9 * 4096);
        assert_eq!(has_marker(&memory), !sealed);
        let mut blocks: Vec<_> = memory.chunks(4096).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len() == 9, sealed, "equal blocks are equal in memory only where they lie open");
        let zeroes = memory.chunks(4096).filter(|block| block.iter().all(|&byte| byte == 0)).count();
        assert_eq!(zeroes, usize::from(!sealed), "zeroes that have memory are no exception");
        assert_eq!(fixture.read(2 * 4096..3 * 4096), data);
        assert_eq!(fixture.read(5 * 4096 + 100..5 * 4096 + 132), MARKER);
        for piece in held {
            let Piece::Blocks { run, first, at, .. } = piece else { panic!("it was written") };
            let mut then = vec![0; 4096];
            fixture.device.copy(&run, first, at, &mut then);
            assert_eq!(then, data);
            fixture.device.release(run, &mut fixture.magazine);
        }
    }
}
