//! Paths for people.

use std::fmt::Write as _;

/// A path for people: as it is behind `prefix`, or in quotes, with escapes as git and C have them, if it holds what is not
/// to be shown as it is, or could be taken for something else.
#[must_use]
pub fn quoted(prefix: &str, path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        // A space at the end could not be seen, and " (" could begin a note.
        Ok(text) if !text.contains(is_odd) && !text.ends_with(' ') && !text.contains(" (") => {
            format!("{prefix}{text}")
        }
        _ => {
            let mut quoted = format!("\"{prefix}");
            for chunk in path.utf8_chunks() {
                for c in chunk.valid().chars() {
                    match c {
                        '"' | '\\' => quoted.extend(['\\', c]),
                        '\n' => quoted.push_str("\\n"),
                        '\t' => quoted.push_str("\\t"),
                        '\r' => quoted.push_str("\\r"),
                        c if is_odd(c) => {
                            let mut bytes = [0; 4];
                            c.encode_utf8(&mut bytes).bytes().for_each(|byte| escape(&mut quoted, byte));
                        }
                        c => quoted.push(c),
                    }
                }
                chunk.invalid().iter().for_each(|&byte| escape(&mut quoted, byte));
            }
            quoted.push('"');
            quoted
        }
    }
}

fn escape(text: &mut String, byte: u8) {
    // Writing to a String does not fail.
    let _ = write!(text, "\\{byte:03o}");
}

/// What a terminal acts on, or what turns text around or cannot be seen.
fn is_odd(c: char) -> bool {
    let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || matches!(c, '"' | '\\' | '\u{2028}' | '\u{2029}' | '\u{feff}') || turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_quoted_and_cannot_play_with_a_terminal() {
        for (path, expected) in [
            (&b""[..], "/"),
            (b"etc/hostname", "/etc/hostname"),
            ("Größe 1".as_bytes(), "/Größe 1"),
            (b"a\nb\t\\\"", r#""/a\nb\t\\\"""#),
            (b"\x1b[31m", r#""/\033[31m""#),
            (b"\xff.x", r#""/\377.x""#),
            (b"a (was b)", r#""/a (was b)""#),
            (b"a ", r#""/a ""#),
            ("\u{202e}cod".as_bytes(), r#""/\342\200\256cod""#),
        ] {
            assert_eq!(quoted("/", path), expected);
        }
    }
}
