//! Sizes as people type and read them: `512M`, `8G`, `1.5T`, `4096`, `64KiB`. All units are binary, as `qemu-img` has them.

/// The letters of the units; each is 1024 times the one before.
const UNITS: &str = "KMGTPE";

/// Reads a size in bytes: a decimal number, perhaps with a fraction, then a unit: none or `B` for bytes, `K`, `M`, `G`, `T`,
/// `P`, `E` (also as `k`, `KiB` and so on). A fraction of a byte is dropped.
///
/// # Errors
/// It is none, negative, in an unknown unit or beyond 64 bits; in words for people.
pub fn parse(text: &str) -> Result<u64, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(match text.chars().next() {
            Some('-') => "a size cannot be negative; write one as 512M or 8G".to_owned(),
            _ => "not a size; write one as 512M, 8G or 4096 (bytes)".to_owned(),
        });
    }
    let shift = unit_shift(unit)?;
    if shift == 0 && !fraction.is_empty() {
        return Err("a byte has no fractions; add a unit, as 1.5G".to_owned());
    }
    let too_large = || "too large; the largest size is just under 16E".to_owned();
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    whole.checked_add(fraction_of(fraction, shift)).ok_or_else(too_large)
}

/// How far to shift for the unit: 0 for bytes, 10 for `K`, and so on.
fn unit_shift(unit: &str) -> Result<u32, String> {
    let mut letters = unit.chars();
    let shift = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
        None => return Ok(0),
        Some('B') if letters.as_str().is_empty() => return Ok(0),
        Some(letter) => (1..).zip(UNITS.chars()).find(|&(_, unit)| unit == letter).map(|(n, _)| n * 10),
    };
    match (shift, letters.as_str().to_ascii_lowercase().as_str()) {
        (Some(shift), "" | "ib") => Ok(shift),
        (Some(_), "b") => {
            let letter = &unit[..1];
            Err(format!(
                "'{unit}' may be decimal or binary; write {letter} or {letter}iB (units are binary here)"
            ))
        }
        _ => Err(format!("unknown unit '{unit}'; use K, M, G, T, P or E")),
    }
}

/// `0.digits` of `1 << shift`, rounded down. More digits than fit the arithmetic say nothing that a byte could show.
fn fraction_of(digits: &str, shift: u32) -> u64 {
    let digits = &digits[..digits.len().min(18)];
    let (mut value, mut scale) = (0_u128, 1_u128);
    for digit in digits.bytes() {
        value = value * 10 + u128::from(digit - b'0');
        scale *= 10;
    }
    u64::try_from((value << shift) / scale).unwrap_or(u64::MAX)
}

/// A size for people, to one decimal of the largest unit that it fills: `812.4 MiB`, `2 GiB`, `512 bytes`.
#[must_use]
pub fn human(bytes: u64) -> String {
    if bytes < 1024 {
        return if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") };
    }
    let (shift, letter) = (1..)
        .map(|n| n * 10)
        .zip(UNITS.chars())
        .take_while(|&(shift, _)| bytes >> shift > 0)
        .last()
        .unwrap_or((0, ' '));
    let tenths = (u128::from(bytes) * 10) >> shift;
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {letter}iB"),
        (whole, tenth) => format!("{whole}.{tenth} {letter}iB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("512b", 512),
            ("4K", 4096),
            ("4k", 4096),
            ("4KiB", 4096),
            ("64kib", 65536),
            ("512M", 512 << 20),
            ("8G", 8 << 30),
            ("8GiB", 8 << 30),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("0.1K", 102),
            ("1.999999999999999999999K", 2047),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("15.5E", 31 << 59),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        for (text, why) in [
            ("", "not a size"),
            ("G", "not a size"),
            (".5G", "not a size"),
            ("1.", "not a size"),
            ("1.G", "not a size"),
            ("1.2.3G", "not a size"),
            ("+1G", "not a size"),
            ("-1G", "negative"),
            ("1.5", "no fractions"),
            ("12Q", "unknown unit 'Q'"),
            ("12 G", "unknown unit ' G'"),
            ("12GG", "unknown unit 'GG'"),
            ("12iB", "unknown unit 'iB'"),
            ("12MB", "write M or MiB"),
            ("1Ä", "unknown unit 'Ä'"),
            ("16E", "too large"),
            ("99999999999999999999", "too large"),
            ("18446744073709551615K", "too large"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_as_people_read_them() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (2 << 30, "2 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
