//! Durations as people type them: `30s`, `500ms`, `2m`, `1.5h`, `30` (seconds).

use std::time::Duration;

/// The longest duration: beyond it a deadline would be no point in time any more that clocks can hold.
const MAX_SECONDS: u128 = 100 * 365 * 86400;

/// Reads a decimal number, perhaps with a fraction, then `ms`, `s` (or nothing), `m`, `h` or `d`.
///
/// # Errors
/// What is wrong with it, in words for people.
pub fn parse(text: &str) -> Result<Duration, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') || fraction.len() > 9 {
        return Err("not a duration; write one as 30s, 500ms, 2m, 1h or 30 (seconds)".to_owned());
    }
    let nanos_per_unit: u128 = match unit {
        "ms" => 1_000_000,
        "" | "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        _ => return Err(format!("unknown unit '{unit}'; use ms, s, m, h or d")),
    };
    let too_long = || "too long; the longest duration is 100 years (36500d)".to_owned();
    let mut nanos = u128::from(whole.parse::<u64>().map_err(|_| too_long())?) * nanos_per_unit;
    let mut unit = nanos_per_unit;
    for digit in fraction.bytes() {
        unit /= 10;
        nanos += u128::from(digit - b'0') * unit;
    }
    if nanos > MAX_SECONDS * 1_000_000_000 {
        return Err(too_long());
    }
    // Both fit: seconds by the line above, the rest by the remainder.
    let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    Ok(Duration::new(u64::try_from(seconds).unwrap_or(u64::MAX), u32::try_from(rest).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("30", 30_000),
            ("30s", 30_000),
            ("500ms", 500),
            ("1.5s", 1_500),
            ("2m", 120_000),
            ("2min", 120_000),
            ("1.25h", 4_500_000),
            ("36500d", 3_153_600_000_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_says_why() {
        for (text, why) in [
            ("", "not a duration; write one as 30s, 500ms, 2m, 1h or 30 (seconds)"),
            ("s", "not a duration"),
            ("-1s", "not a duration"),
            ("1.s", "not a duration"),
            ("1..2s", "not a duration"),
            ("30 s", "unknown unit ' s'"),
            ("30sec", "unknown unit 'sec'"),
            ("30S", "unknown unit 'S'"),
            ("36501d", "too long"),
            ("18446744073709551615d", "too long"),
            ("99999999999999999999", "too long"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
