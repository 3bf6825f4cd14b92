//! Signatures of requests (AWS Signature Version 4, in the header `Authorization`). Pure.

use ring::digest::{SHA256, digest};
use ring::hmac::{HMAC_SHA256, Key, sign};
use zeroize::Zeroizing;

use crate::carry::entry::{Time, hexadecimal};

/// Who signs, and for which part of the world.
pub(super) struct Signer {
    pub(super) key_id: String,
    pub(super) secret: Zeroizing<String>,
    pub(super) region: String,
}

/// What is signed. Headers are all that are, in small letters and sorted, with the host's, the hash of the body and the time among
/// them.
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    /// As it is sent.
    pub(super) path: &'a str,
    /// As it is sent, sorted.
    pub(super) query: &'a str,
    pub(super) headers: &'a [(String, String)],
    /// See [`hash`].
    pub(super) body: &'a str,
    /// See [`time`].
    pub(super) time: &'a str,
}

impl Signer {
    /// The value of `Authorization`.
    pub(super) fn sign(&self, what: &Signed<'_>) -> String {
        let Signed { method, path, query, headers, body, time } = what;
        let lines: String =
            headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
        let names: Vec<_> = headers.iter().map(|(name, _)| &**name).collect();
        let names = names.join(";");
        let request = format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{body}");
        let day = &time[..8];
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hash(request.as_bytes()));
        let mut key = Zeroizing::new(format!("AWS4{}", *self.secret).into_bytes());
        for part in [day, &self.region, "s3", "aws4_request"] {
            key = Zeroizing::new(keyed(&key, part));
        }
        let signature = hexadecimal(&keyed(&key, &text));
        format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope},SignedHeaders={names},Signature={signature}",
            self.key_id
        )
    }
}

fn keyed(key: &[u8], text: &str) -> Vec<u8> {
    sign(&Key::new(HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

/// SHA-256, in hexadecimal.
pub(super) fn hash(bytes: &[u8]) -> String {
    hexadecimal(digest(&SHA256, bytes).as_ref())
}

/// A moment as `20130524T000000Z`.
pub(super) fn time(moment: Time) -> String {
    format!("{}Z", moment.date())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of Amazon's own description.
    #[test]
    fn signatures_are_those_of_the_description() {
        let signer = Signer {
            key_id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret: Zeroizing::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned()),
            region: "us-east-1".to_owned(),
        };
        let time = "20130524T000000Z";
        let of = |method: &str, path: &str, query: &str, more: &[(&str, &str)], body: &[u8]| {
            let body = hash(body);
            let mut headers = vec![
                ("host", "examplebucket.s3.amazonaws.com"),
                ("x-amz-content-sha256", &*body),
                ("x-amz-date", time),
            ];
            headers.extend_from_slice(more);
            headers.sort_unstable();
            let headers: Vec<_> =
                headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            let signed = signer.sign(&Signed { method, path, query, headers: &headers, body: &body, time });
            signed.rsplit_once('=').unwrap().1.to_owned()
        };
        assert_eq!(
            of("GET", "/test.txt", "", &[("range", "bytes=0-9")], b""),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let more = [("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")];
        assert_eq!(
            of("PUT", "/test%24file.text", "", &more, b"Welcome to Amazon S3."),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        assert_eq!(
            of("GET", "/", "lifecycle=", &[], b""),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
        assert_eq!(
            of("GET", "/", "max-keys=2&prefix=J", &[], b""),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }

    #[test]
    fn times_are_written_as_they_are_signed() {
        let of = |seconds| time(Time::new(seconds, 0_u32));
        assert_eq!(of(1_369_353_600), "20130524T000000Z");
        assert_eq!(of(1_709_251_199), "20240229T235959Z");
        assert_eq!(of(1_796_083_200), "20261201T000000Z");
    }
}
