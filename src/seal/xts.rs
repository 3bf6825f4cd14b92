//! XTS-AES-256 (IEEE 1619-2018, NIST SP 800-38E) for data units that are multiples of 16 bytes, so without the stealing of
//! ciphertext that other lengths need.
//!
//! `C = E1(P ^ T) ^ T`, with a tweak `T` for each 16 bytes: the first of a unit is `E2(number of the unit)`, each further one is
//! the one before times x in GF(2^128). Many blocks are given to the cipher at a time, which does as many at once as the
//! processor's instructions allow.
#![allow(clippy::disallowed_methods, reason = "IEEE 1619 is little-endian")]

use aes::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Aes256Enc};
use zeroize::Zeroizing;

/// Bytes of a key: two of AES-256.
pub(super) const KEY_BYTES: usize = 64;
/// Bytes that AES does at a time.
const BLOCK: usize = 16;
/// AES blocks that are given to the cipher at a time.
const LANES: usize = 64;

/// Both keys, ready for use.
pub(super) struct Xts {
    data: Aes256,
    tweak: Aes256Enc,
}

/// A tweak. As IEEE 1619 has it the first byte is the lowest.
#[derive(Clone, Copy)]
struct Tweak(u128);

impl Tweak {
    /// Times x^`by`, 64 at most.
    fn times(self, by: u32) -> Self {
        debug_assert!(by <= 64);
        if by == 0 {
            return self;
        }
        let over = self.0 >> (128 - by);
        // x^128 is x^7 + x^2 + x + 1.
        Self((self.0 << by) ^ over ^ (over << 1) ^ (over << 2) ^ (over << 7))
    }

    fn after(self, mut blocks: usize) -> Self {
        let mut tweak = self;
        while blocks >= 64 {
            tweak = tweak.times(64);
            blocks -= 64;
        }
        #[allow(clippy::cast_possible_truncation, reason = "below 64")]
        tweak.times(blocks as u32)
    }

    fn put_on(self, block: &mut [u8; BLOCK]) {
        *block = (u128::from_le_bytes(*block) ^ self.0).to_le_bytes();
    }
}

impl Xts {
    /// The first half of the key is for data.
    pub(super) fn new(key: &[u8; KEY_BYTES]) -> Self {
        let (data, tweak) = key.split_at(KEY_BYTES / 2);
        // Both are as long as a key is.
        let key = |half: &[u8]| Zeroizing::new(<[u8; 32]>::try_from(half).unwrap_or_default());
        let (data, tweak) = (key(data), key(tweak));
        Self { data: Aes256::new((&*data).into()), tweak: Aes256Enc::new((&*tweak).into()) }
    }

    /// The tweak of the AES block `first` of a unit.
    fn tweak(&self, unit: u64, first: usize) -> Tweak {
        let mut block = Array::from(u128::from(unit).to_le_bytes());
        self.tweak.encrypt_block(&mut block);
        Tweak(u128::from_le_bytes(block.into())).after(first)
    }

    fn apply(&self, unit: u64, first: usize, bytes: &mut [u8], cipher: impl Fn(&mut [Block<Aes256>])) {
        assert_eq!(bytes.len() % BLOCK, 0, "only whole AES blocks");
        let mut tweak = self.tweak(unit, first);
        let mut tweaks = [Tweak(0); LANES];
        for lanes in bytes.chunks_mut(LANES * BLOCK) {
            let (blocks, _) = lanes.as_chunks_mut::<BLOCK>();
            for (block, kept) in blocks.iter_mut().zip(&mut tweaks) {
                tweak.put_on(block);
                *kept = tweak;
                tweak = tweak.times(1);
            }
            cipher(Array::cast_slice_from_core_mut(blocks));
            blocks.iter_mut().zip(&tweaks).for_each(|(block, tweak)| tweak.put_on(block));
        }
    }

    /// Encrypts `bytes`, which begin at AES block `first` of the unit.
    pub(super) fn encrypt(&self, unit: u64, first: usize, bytes: &mut [u8]) {
        self.apply(unit, first, bytes, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// The other way.
    pub(super) fn decrypt(&self, unit: u64, first: usize, bytes: &mut [u8]) {
        self.apply(unit, first, bytes, |blocks| self.data.decrypt_blocks(blocks));
    }

    /// Puts `data` at byte `at` of a unit that is encrypted.
    pub(super) fn write(&self, unit: u64, sealed: &mut [u8], at: usize, data: &[u8]) {
        let end = at + data.len();
        if data.is_empty() {
            return;
        }
        let (first, last) = (at / BLOCK, (end - 1) / BLOCK);
        // What the first and the last of them keep of what they held. They may be the same one.
        let (begins_within, ends_within) = (!at.is_multiple_of(BLOCK), !end.is_multiple_of(BLOCK));
        if begins_within || (first == last && ends_within) {
            self.decrypt(unit, first, &mut sealed[first * BLOCK..][..BLOCK]);
        }
        if ends_within && first != last {
            self.decrypt(unit, last, &mut sealed[last * BLOCK..][..BLOCK]);
        }
        sealed[at..end].copy_from_slice(data);
        self.encrypt(unit, first, &mut sealed[first * BLOCK..(last + 1) * BLOCK]);
    }

    /// Puts what is at byte `at` of a unit into `out`, decrypted.
    pub(super) fn read(&self, unit: u64, sealed: &[u8], at: usize, out: &mut [u8]) {
        let (mut at, mut out) = (at, out);
        while !out.is_empty() {
            let within = at % BLOCK;
            let count = if within == 0 && out.len() >= BLOCK {
                // As far as whole blocks go, where they are wanted.
                let count = out.len() - out.len() % BLOCK;
                out[..count].copy_from_slice(&sealed[at..at + count]);
                self.decrypt(unit, at / BLOCK, &mut out[..count]);
                count
            } else {
                let count = out.len().min(BLOCK - within);
                let start = at - within;
                let mut block = Zeroizing::new([0; BLOCK]);
                block.copy_from_slice(&sealed[start..start + BLOCK]);
                self.decrypt(unit, start / BLOCK, &mut block[..]);
                out[..count].copy_from_slice(&block[within..within + count]);
                count
            };
            at += count;
            out = &mut out[count..];
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// The key of IEEE 1619's vectors 10 to 14.
    fn key() -> [u8; KEY_BYTES] {
        let text = "2718281828459045235360287471352662497757247093699959574966967627\
                    3141592653589793238462643383279502884197169399375105820974944592";
        hex(text).try_into().unwrap()
    }

    fn ascending() -> Vec<u8> {
        (0..=255).chain(0..=255).collect()
    }

    /// Vectors 10 to 14 of IEEE 1619-2007, annex B: how the ciphertext begins, how it ends, and the SHA-256 of all of it.
    #[test]
    fn the_standards_vectors() {
        let vectors = [
            (
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
                "c4f36ffda9fcea70b9c6e693e148c151",
                "e97e974fa393af794f7a4684395814cf820de60a01eaec677d87b452e316b364",
            ),
            (
                0xffff,
                "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11",
                "a4f9e27b42af8100cb9d59cef9645803",
                "def4fad29e95dfe1a24b1ad4620f86d7be094cced5b19e0b121aa82d9e6baf98",
            ),
            (
                0xff_ffff,
                "e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200",
                "2263a1eef52dd6888c309f5a7d712826",
                "8bf44861a081dd660d91ce615b5cdfb4d5df9d72c3025c12e67cc0ae097fa5d5",
            ),
            (
                0xffff_ffff,
                "bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5",
                "4c82f335abb152c4a93411373aaa8220",
                "c706140a11affda7402234f5e6331eacbfeb687d8e80d83962691823bb3636f0",
            ),
            (
                0xff_ffff_ffff,
                "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23",
                "d609d273ad5b0d59631c531f6a0a57b9",
                "afba71abc4e95b186d89a63a5437c1bafcfd1a18ca273970c534aba4f8d05282",
            ),
        ];
        let xts = Xts::new(&key());
        for (unit, begins, ends, digest) in vectors {
            let mut bytes = ascending();
            xts.encrypt(unit, 0, &mut bytes);
            assert_eq!((&bytes[..32], &bytes[496..]), (&hex(begins)[..], &hex(ends)[..]), "unit {unit:#x}");
            let sum = ring::digest::digest(&ring::digest::SHA256, &bytes);
            assert_eq!(sum.as_ref(), hex(digest), "unit {unit:#x}");
            xts.decrypt(unit, 0, &mut bytes);
            assert_eq!(bytes, ascending());
        }
    }

    #[test]
    fn a_tweak_of_the_middle_is_that_of_the_way_there() {
        let start = Tweak(0xe1a5_0000_0000_0000_0000_0000_dead_beef);
        let mut by_ones = start;
        for count in 0..1000 {
            assert_eq!(start.after(count).0, by_ones.0, "{count}");
            by_ones = by_ones.times(1);
        }
    }

    proptest! {
        #[test]
        fn any_part_of_a_unit_is_written_and_read(
            len in (1..40_usize).prop_map(|blocks| blocks * 64),
            (at, count) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            value in any::<u8>(),
        ) {
            let xts = Xts::new(&key());
            let at = at.index(len);
            let count = count.index(len - at + 1);
            let mut model: Vec<u8> = (0..len).map(|at| u8::try_from(at % 253).unwrap()).collect();
            let mut sealed = model.clone();
            xts.encrypt(7, 0, &mut sealed);
            let data = vec![value; count];
            xts.write(7, &mut sealed, at, &data);
            model[at..at + count].copy_from_slice(&data);
            let mut all = sealed.clone();
            xts.decrypt(7, 0, &mut all);
            prop_assert_eq!(&all, &model);
            let mut part = vec![0; count];
            xts.read(7, &sealed, at, &mut part);
            prop_assert_eq!(&part, &data);
        }
    }
}
