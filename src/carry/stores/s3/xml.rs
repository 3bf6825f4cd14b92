//! What a server answers as XML. Pure, and nothing of it is trusted: what is not understood is refused whole, since half a listing
//! would look like files that are gone.

use roxmltree::{Document, Node, ParsingOptions};

/// The most parts that an answer may have; a listing has 1,000 objects.
const NODES_MAX: u32 = 100_000;

/// A page of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    /// The objects' keys.
    pub(super) keys: Vec<String>,
    /// What is before a slash in other objects' keys, with the slash.
    pub(super) prefixes: Vec<String>,
    /// How to ask for the next one.
    pub(super) next: Option<String>,
}

/// An upload in parts that nobody has finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unfinished {
    pub(super) key: String,
    pub(super) id: String,
    /// Such as `2026-11-29T12:00:00.000Z`.
    pub(super) begun: String,
}

/// Reads a page of a listing.
///
/// # Errors
/// Why it is not understood.
pub(super) fn page(text: &str) -> Result<Page, String> {
    let document = document(text)?;
    let root = root(&document, "ListBucketResult")?;
    let keys = all(root, "Contents", "Key")?;
    let prefixes = all(root, "CommonPrefixes", "Prefix")?;
    let next = match value(root, "IsTruncated").as_deref() {
        Some("true") => Some(value(root, "NextContinuationToken").ok_or("a page without the next one")?),
        Some("false") => None,
        _ => return Err("it does not say whether it is whole".to_owned()),
    };
    Ok(Page { keys, prefixes, next })
}

/// Reads which uploads nobody has finished.
///
/// # Errors
/// Why it is not understood.
pub(super) fn unfinished(text: &str) -> Result<Vec<Unfinished>, String> {
    let document = document(text)?;
    let root = root(&document, "ListMultipartUploadsResult")?;
    let one = |upload| {
        let of = |name| value(upload, name).ok_or_else(|| format!("an upload without {name}"));
        Ok(Unfinished { key: of("Key")?, id: of("UploadId")?, begun: of("Initiated")? })
    };
    children(root, "Upload").map(one).collect()
}

/// What is under `name` in an answer that is called `kind`. That something has failed some servers say late, in an answer that
/// had begun as a success.
///
/// # Errors
/// Why it is not understood, or what the server says has failed.
pub(super) fn field(text: &str, kind: &str, name: &str) -> Result<String, String> {
    let document = document(text)?;
    value(root(&document, kind)?, name).ok_or_else(|| format!("an answer without {name}"))
}

/// What the server says has failed: its word for it, and a sentence.
pub(super) fn error(text: &str) -> Option<(String, String)> {
    let document = document(text).ok()?;
    let root = document.root_element();
    (root.tag_name().name() == "Error")
        .then(|| (value(root, "Code").unwrap_or_default(), value(root, "Message").unwrap_or_default()))
}

fn document(text: &str) -> Result<Document<'_>, String> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    Document::parse_with_options(text.trim_start(), options).map_err(|error| error.to_string())
}

fn root<'a>(document: &'a Document<'a>, name: &str) -> Result<Node<'a, 'a>, String> {
    let root = document.root_element();
    match root.tag_name().name() {
        found if found == name => Ok(root),
        "Error" => Err(value(root, "Code").unwrap_or_default()),
        _ => Err(format!("it is no {name}")),
    }
}

/// Servers do not agree on the namespace.
fn children<'a>(node: Node<'a, 'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(move |child| child.tag_name().name() == name)
}

fn value(node: Node<'_, '_>, name: &str) -> Option<String> {
    let found = node.children().find(|child| child.tag_name().name() == name)?;
    Some(found.children().filter_map(|child| child.text()).collect())
}

fn all(node: Node<'_, '_>, outer: &'static str, inner: &'static str) -> Result<Vec<String>, String> {
    children(node, outer)
        .map(|one| value(one, inner).ok_or_else(|| format!("an entry without {inner}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>a/</Prefix><KeyCount>3</KeyCount>
<MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter><IsTruncated>true</IsTruncated><NextContinuationToken>t&amp;1=</NextContinuationToken>
<Contents><Key>a/x &amp; y</Key><ETag>&quot;e&quot;</ETag><Size>7</Size></Contents><Contents><Key>a/ z</Key></Contents>
<CommonPrefixes><Prefix>a/d/</Prefix></CommonPrefixes></ListBucketResult>"#;

    #[test]
    fn listings_are_read() {
        let strings = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
        let expected = Page {
            keys: strings(&["a/x & y", "a/ z"]),
            prefixes: strings(&["a/d/"]),
            next: Some("t&1=".to_owned()),
        };
        assert_eq!(page(LISTING), Ok(expected));
        for length in (0..LISTING.len()).filter(|length| LISTING.is_char_boundary(*length)) {
            assert!(page(&LISTING[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn what_is_no_whole_listing_is_refused() {
        let of = |inner: &str| page(&format!("<ListBucketResult>{inner}</ListBucketResult>"));
        assert_eq!(of("<IsTruncated>false</IsTruncated>"), Ok(Page::default()));
        for bad in [
            "",
            "<IsTruncated>true</IsTruncated>",
            "<IsTruncated>false</IsTruncated><Contents/>",
            "<IsTruncated>false</IsTruncated><CommonPrefixes/>",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert_eq!(page("<Error><Code>NoSuchBucket</Code></Error>"), Err("NoSuchBucket".to_owned()));
        assert!(page("<!DOCTYPE x [<!ENTITY a 'b'>]><ListBucketResult>&a;</ListBucketResult>").is_err());
        let many = format!("<ListBucketResult>{}</ListBucketResult>", "<a/>".repeat(NODES_MAX as usize));
        assert!(page(&many).is_err());
    }

    #[test]
    fn what_failed_late_is_no_success() {
        let done = "<CompleteMultipartUploadResult><ETag>\"e-2\"</ETag></CompleteMultipartUploadResult>";
        let of = |text| field(text, "CompleteMultipartUploadResult", "ETag");
        assert_eq!(of(done), Ok("\"e-2\"".to_owned()));
        let failed = "\n\n<Error><Code>InternalError</Code><Message>We &lt;failed&gt;</Message></Error>";
        assert_eq!(of(failed), Err("InternalError".to_owned()));
        assert_eq!(error(failed), Some(("InternalError".to_owned(), "We <failed>".to_owned())));
        assert_eq!(error(done), None);
        assert_eq!(error("<html>"), None);
    }

    #[test]
    fn unfinished_uploads_are_read() {
        let text = "<ListMultipartUploadsResult><Upload><Key>k</Key><UploadId>u</UploadId><Initiated>2026</Initiated></Upload>\
                    </ListMultipartUploadsResult>";
        let expected = Unfinished { key: "k".to_owned(), id: "u".to_owned(), begun: "2026".to_owned() };
        assert_eq!(unfinished(text), Ok(vec![expected]));
        assert!(unfinished("<ListMultipartUploadsResult><Upload/></ListMultipartUploadsResult>").is_err());
    }
}
