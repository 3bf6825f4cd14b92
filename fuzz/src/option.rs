//! Option haggling's payloads, both ways: whatever parses is written back as the same bytes.
//!
//! The input's first byte says which kind of message the rest is.

use memdev::proto::{
    ExportEntry, ExportNameReply, Greeting, InfoItem, InfoPayload, MetaContext, MetaContextPayload,
    OptionHeader, OptionReplyHeader,
};

/// One input.
pub fn body(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 9 {
        0 => {
            let Some(bytes) = data.first_chunk() else { return };
            let Ok(header) = OptionHeader::parse(bytes) else { return };
            assert_eq!(header.encode(), *bytes);
        }
        1 => {
            let Some(bytes) = data.first_chunk() else { return };
            let Ok(header) = OptionReplyHeader::parse(bytes) else { return };
            assert_eq!(header.encode(), *bytes);
        }
        2 => {
            let Ok(payload) = InfoPayload::parse(data) else { return };
            let requests: Vec<_> = payload.requests().collect();
            assert_eq!(InfoPayload::build(payload.name, &requests), data);
        }
        3 => {
            let Ok(payload) = MetaContextPayload::parse(data) else { return };
            let queries: Vec<_> = payload.queries().collect();
            assert_eq!(payload.is_empty(), queries.is_empty());
            assert_eq!(MetaContextPayload::build(payload.export_name, &queries), data);
        }
        4 => {
            let Ok(item) = InfoItem::parse(data) else { return };
            assert_eq!(item.encode(), data);
        }
        5 => {
            let Ok(entry) = ExportEntry::parse(data) else { return };
            assert_eq!(entry.encode(), data);
        }
        6 => {
            let Ok(context) = MetaContext::parse(data) else { return };
            assert_eq!(context.encode(), data);
        }
        7 => {
            let Some(bytes) = data.first_chunk() else { return };
            let Ok(greeting) = Greeting::parse(bytes) else { return };
            assert_eq!(greeting.encode(), *bytes);
        }
        _ => {
            let Some(bytes) = data.first_chunk() else { return };
            let mut out = Vec::new();
            ExportNameReply::parse(bytes).append_to(&mut out, false);
            assert_eq!(out, bytes);
        }
    }
}
