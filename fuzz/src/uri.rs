//! Addresses and names as people and URIs write them: whatever is understood is written back so that it is understood
//! as the same.

use std::str;

use memdev::net::{Address, Uri};
use memdev::session::{Request, SessionId};

/// One input.
pub fn body(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<Uri>() {
        assert!(Uri::looks_like(text), "what is a URI looks like one");
        assert_same(&uri);
    }
    for address in [Address::tcp(text), Address::unix(text), Address::vsock(text)].into_iter().flatten() {
        assert_same(&Uri { export: text.to_owned(), ..Uri::from(address) });
    }
    match Request::parse(text) {
        Request::Fresh(image) => assert_eq!(image, text),
        Request::Named(image, id) => {
            assert_eq!(format!("{image}@{id}"), text);
            assert_eq!(SessionId::new(&id.to_string()), Some(id));
        }
        Request::Existing(image, id) => assert_eq!(format!("{image}@{id}?"), text),
        Request::BadId(id) => {
            assert!(text.ends_with(id) && SessionId::new(id).is_none());
        }
    }
}

fn assert_same(uri: &Uri) {
    let text = uri.to_string();
    assert!(Uri::looks_like(&text), "{text} does not look like a URI");
    match text.parse::<Uri>() {
        Ok(again) => assert_eq!(again, *uri, "{text}"),
        Err(error) => panic!("{text}: {error}"),
    }
}
