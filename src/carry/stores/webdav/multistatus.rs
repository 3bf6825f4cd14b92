//! What a server tells of files (RFC 4918, section 13), and what it is told of them. Pure, and nothing of it is trusted: what is
//! not understood is refused whole, since half a listing would look like files that are gone.

use roxmltree::{Document, Node, ParsingOptions};

use crate::carry::entry::unescape;
use crate::carry::stores::http;

/// The XML namespace of the protocol.
const DAV: &str = "DAV:";

/// The XML namespace of what memdev keeps beside a file.
pub(super) const OURS: &str = "urn:memdev:carry";

/// The most parts that an answer may have, which bounds the memory that it takes once it is understood.
const NODES_MAX: u32 = 3_000_000;

/// What is asked of files.
pub(super) fn question() -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?><D:propfind xmlns:D=\"{DAV}\" xmlns:m=\"{OURS}\"><D:prop><D:resourcetype/>\
         <D:getcontentlength/><D:getlastmodified/><D:getetag/><m:inside/><m:attributes/></D:prop></D:propfind>"
    )
}

/// Has properties of memdev's set: each name with its value.
pub(super) fn update(properties: &[(&str, &str)]) -> String {
    let all: String =
        properties.iter().map(|(name, value)| format!("<m:{name}>{}</m:{name}>", quote(value))).collect();
    format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?><D:propertyupdate xmlns:D=\"{DAV}\" xmlns:m=\"{OURS}\"><D:set><D:prop>{all}\
         </D:prop></D:set></D:propertyupdate>"
    )
}

fn quote(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// What a server tells of one file or directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resource {
    /// Its path on the server, without a slash at its end.
    pub(super) path: Vec<u8>,
    pub(super) is_directory: bool,
    /// Bytes.
    pub(super) size: Option<u64>,
    /// When it was changed, by the server's clock, in seconds since 1970.
    pub(super) modified: Option<i64>,
    /// The server's name for this version of it.
    pub(super) tag: Option<String>,
    /// What memdev had set.
    pub(super) inside: Option<String>,
    /// What memdev had set.
    pub(super) attributes: Option<String>,
}

/// Reads what a server tells of files.
///
/// # Errors
/// Why it is not understood.
pub(super) fn parse(text: &str) -> Result<Vec<Resource>, String> {
    let document = document(text)?;
    let mut all = Vec::new();
    for response in responses(&document)? {
        let [href] = children(response, "href").collect::<Vec<_>>()[..] else {
            return Err("an entry without one path".to_owned());
        };
        let mut resource = Resource { path: path_of(&content(href))?, ..Resource::default() };
        let mut is_told = false;
        for found in children(response, "propstat").filter(|found| has_succeeded(*found)) {
            is_told = true;
            for property in children(found, "prop").flat_map(|all| all.children()).filter(Node::is_element) {
                resource.take(property)?;
            }
        }
        // Of what it tells nothing there is nothing.
        if is_told {
            all.push(resource);
        }
    }
    Ok(all)
}

/// Whether everything was set that was to be.
///
/// # Errors
/// Why it is not understood.
pub(super) fn is_all_set(text: &str) -> Result<bool, String> {
    let document = document(text)?;
    let mut some = false;
    for response in responses(&document)? {
        for part in children(response, "propstat") {
            some = true;
            if !has_succeeded(part) {
                return Ok(false);
            }
        }
    }
    Ok(some)
}

impl Resource {
    fn take(&mut self, property: Node<'_, '_>) -> Result<(), String> {
        let name = property.tag_name();
        match (name.namespace(), name.name()) {
            (Some(DAV), "resourcetype") => {
                self.is_directory = children(property, "collection").next().is_some();
            }
            (Some(DAV), "getcontentlength") if !content(property).is_empty() => {
                let size = content(property).parse().map_err(|_| "a length that is no number".to_owned())?;
                self.size = Some(size);
            }
            (Some(DAV), "getlastmodified") => {
                self.modified = http::seconds(&content(property));
            }
            (Some(DAV), "getetag") => {
                self.tag = http::tag(&content(property));
            }
            (Some(OURS), "inside") => self.inside = Some(content(property)),
            (Some(OURS), "attributes") => self.attributes = Some(content(property)),
            _ => {}
        }
        Ok(())
    }
}

fn document(text: &str) -> Result<Document<'_>, String> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    Document::parse_with_options(text, options).map_err(|error| error.to_string())
}

fn responses<'a>(document: &'a Document<'a>) -> Result<impl Iterator<Item = Node<'a, 'a>>, String> {
    let root = document.root_element();
    if !root.has_tag_name((DAV, "multistatus")) {
        return Err("no list of files".to_owned());
    }
    Ok(children(root, "response"))
}

fn children<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name((DAV, name)))
}

/// The text in it, without the spaces around.
fn content(node: Node<'_, '_>) -> String {
    let text: String = node.children().filter_map(|child| child.text()).collect();
    text.trim().to_owned()
}

fn has_succeeded(part: Node<'_, '_>) -> bool {
    let status = children(part, "status").next().map(content).unwrap_or_default();
    status.split_ascii_whitespace().nth(1).is_some_and(|code| code.len() == 3 && code.starts_with('2'))
}

/// The path that a server means, whether it says it with its own name before or not.
fn path_of(href: &str) -> Result<Vec<u8>, String> {
    use std::os::unix::ffi::OsStringExt;
    let path = match href.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => &rest[rest.find('/').unwrap_or(rest.len())..],
        _ => href,
    };
    if !path.is_empty() && !path.starts_with('/') {
        return Err("a path that does not begin at the server's root".to_owned());
    }
    let path = unescape(path.trim_end_matches('/')).ok_or("a path with a bad % escape")?;
    let path = path.into_os_string().into_vec();
    if path.contains(&0) {
        return Err("a path with a NUL".to_owned());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Apache has it.
    const LISTING: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<D:multistatus xmlns:D="DAV:" xmlns:ns0="DAV:">
<D:response xmlns:lp1="DAV:" xmlns:lp2="http://apache.org/dav/props/" xmlns:ns1="urn:memdev:carry">
<D:href>/files/</D:href>
<D:propstat><D:prop><lp1:resourcetype><D:collection/></lp1:resourcetype>
<lp1:getlastmodified>Thu, 01 Jan 1970 00:01:40 GMT</lp1:getlastmodified><lp1:getetag>"1000-6"</lp1:getetag></D:prop>
<D:status>HTTP/1.1 200 OK</D:status></D:propstat>
<D:propstat><D:prop><ns1:inside/></D:prop><D:status>HTTP/1.1 404 Not Found</D:status></D:propstat>
</D:response>
<D:response xmlns:lp1="DAV:" xmlns:ns1="urn:memdev:carry">
<D:href>http://files.example:80/files/50%25%20%c3%a4</D:href>
<D:propstat><D:prop><lp1:resourcetype/><lp1:getcontentlength>7</lp1:getcontentlength><lp1:getetag>W/"7-6"</lp1:getetag>
<ns1:inside>100644 0 0 1 2 7-6 id &lt;name&gt;</ns1:inside></D:prop>
<D:status>HTTP/1.1 200 OK</D:status></D:propstat>
</D:response>
</D:multistatus>"#;

    #[test]
    fn listings_are_read() {
        let all = parse(LISTING).unwrap();
        let directory = Resource {
            path: b"/files".to_vec(),
            is_directory: true,
            modified: Some(100),
            tag: Some("1000-6".to_owned()),
            ..Resource::default()
        };
        let file = Resource {
            path: "/files/50% ä".as_bytes().to_vec(),
            size: Some(7),
            tag: Some("7-6".to_owned()),
            inside: Some("100644 0 0 1 2 7-6 id <name>".to_owned()),
            ..Resource::default()
        };
        assert_eq!(all, [directory, file]);
    }

    #[test]
    fn what_is_cut_short_or_no_listing_is_refused_whole() {
        for length in (0..LISTING.len()).filter(|length| LISTING.is_char_boundary(*length)) {
            assert!(parse(&LISTING[..length]).is_err(), "{length}");
        }
        let of = |inner: &str| parse(&format!("<multistatus xmlns='DAV:'>{inner}</multistatus>"));
        assert_eq!(of(""), Ok(Vec::new()));
        for bad in [
            "<response/>",
            "<response><href>/a</href><href>/b</href></response>",
            "<response><href>a</href></response>",
            "<response><href>../a</href></response>",
            "<response><href>/%0</href></response>",
            "<response><href>/a%00b</href></response>",
            "<response><href>/a</href><propstat><prop><getcontentlength>-1</getcontentlength></prop><status>HTTP/1.1 200 OK</status>\
             </propstat></response>",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert!(parse("<html xmlns='DAV:'/>").is_err());
        assert!(parse("<multistatus/>").is_err(), "of no namespace");
        assert!(parse("<!DOCTYPE x [<!ENTITY a 'b'>]><multistatus xmlns='DAV:'>&a;</multistatus>").is_err());
    }

    #[test]
    fn neither_depth_nor_number_is_too_much() {
        let deep = format!(
            "<multistatus xmlns='DAV:'>{}{}</multistatus>",
            "<a>".repeat(200_000),
            "</a>".repeat(200_000)
        );
        assert_eq!(parse(&deep), Ok(Vec::new()));
        let many = format!("<multistatus xmlns='DAV:'>{}</multistatus>", "<a/>".repeat(NODES_MAX as usize));
        assert!(parse(&many).is_err());
    }

    #[test]
    fn what_was_not_set_is_noticed() {
        let of = |statuses: &[&str]| {
            let part =
                |status: &&str| format!("<propstat><prop/><status>HTTP/1.1 {status}</status></propstat>");
            let all: String = statuses.iter().map(part).collect();
            is_all_set(&format!(
                "<multistatus xmlns='DAV:'><response><href>/</href>{all}</response></multistatus>"
            ))
        };
        assert_eq!(of(&["200 OK"]), Ok(true));
        assert_eq!(of(&["200 OK", "403 Forbidden"]), Ok(false));
        assert_eq!(of(&[]), Ok(false));
        assert!(is_all_set("").is_err());
    }

    #[test]
    fn what_is_set_stays_as_it_is() {
        let update = update(&[("inside", "a & <b> ]]>")]);
        let document = Document::parse(&update).unwrap();
        let inside = document.descendants().find(|node| node.has_tag_name((OURS, "inside"))).unwrap();
        assert_eq!(content(inside), "a & <b> ]]>");
    }
}
