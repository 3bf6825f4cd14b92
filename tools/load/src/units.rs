//! What people type: sizes (`4K`, `1GiB`) and patterns' numbers.

/// A size in bytes: digits with an optional binary suffix `K`, `M`, `G` or `T` (`KiB`, `MiB`, .. are the same).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return Err(format!("'{text}' is not a size; write it as 512, 4K, 128K, 1G")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a size; write it as 512, 4K, 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// The length of one request: 1 byte to 32 MiB, the most that servers take.
pub(crate) fn block(text: &str) -> Result<u32, String> {
    match u32::try_from(size(text)?) {
        Ok(block @ 1..=0x200_0000) => Ok(block),
        _ => Err(format!("'{text}' is no length for one request; 1 byte to 32M")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("4K"), Ok(4096));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert!(size("4X").is_err());
        assert!(size("").is_err());
        assert!(size("99999999999T").is_err());
        assert!(block("33M").is_err());
    }
}
