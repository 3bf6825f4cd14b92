//! A seed for the target `ext4` from two images of small file systems: `BASE SESSION SEED`.

use memdev_fuzz::ext4::BLOCK;

fn main() -> std::io::Result<()> {
    let names: Vec<_> = std::env::args_os().skip(1).collect();
    let [base, session, seed] = &names[..] else {
        return Err(std::io::Error::other("give BASE SESSION SEED"));
    };
    let (base, session) = (std::fs::read(base)?, std::fs::read(session)?);
    let mebibytes = u8::try_from(session.len().div_ceil(1 << 20)).map_err(std::io::Error::other)?;
    let mut out = vec![mebibytes];
    let mut add = |number: usize, mark: u16, block: &[u8]| {
        let number = u16::try_from(number).unwrap_or(0x7fff) | mark;
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(block);
    };
    for (number, (before, now)) in base.chunks(BLOCK).zip(session.chunks(BLOCK)).enumerate() {
        if before.iter().any(|&byte| byte != 0) {
            add(number, 0, before);
        }
        if before != now {
            add(number, 0x8000, now);
        }
    }
    std::fs::write(seed, out)
}
