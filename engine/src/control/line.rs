//! One line in, one line out: the only place where bytes of the wire become requests and replies become bytes.
//!
//! Pure: no descriptor, no peer, no clock, so the fuzzer and the tests drive exactly what the daemon runs. The version is
//! checked before the rest is understood: a client of another version learns that, and not that a field is unknown.

use proto::{Body, ErrorKind, Failure, PROTOCOL_VERSION, Request, Response};
use serde_json::Value;

/// Parse one request line, with or without its newline. On refusal: the request's id (0 if it could not be read) and why.
///
/// # Errors
/// `Limit` (too long), `Version` (another protocol version, except for `hello`), `Invalid` (anything else).
pub fn parse(line: &[u8]) -> Result<Request, (u64, Failure)> {
    if line.len() > proto::MAX_LINE {
        return Err((0, failure(ErrorKind::Limit, too_long())));
    }
    // The loose look finds id and version in whatever a future client may send; the strict one follows.
    let loose: Value = serde_json::from_slice(line)
        .map_err(|error| (0, failure(ErrorKind::Invalid, format!("not a request: {error}"))))?;
    let id = loose.get("id").and_then(Value::as_u64).unwrap_or(0);
    let hello = loose.get("call").is_some_and(|call| call.get("hello").is_some());
    match loose.get("v").map(Value::as_u64) {
        Some(Some(version)) if version == u64::from(PROTOCOL_VERSION) => {}
        Some(Some(_)) if hello => {
            let call = proto::Call::Hello {};
            return Ok(Request { v: PROTOCOL_VERSION, id, call });
        }
        Some(Some(version)) => {
            let message = format!("protocol version {version} asked, this daemon speaks {PROTOCOL_VERSION}");
            return Err((id, failure(ErrorKind::Version, message)));
        }
        _ => return Err((id, failure(ErrorKind::Invalid, "not a request: no protocol version in \"v\""))),
    }
    drop(loose);
    serde_json::from_slice(line)
        .map_err(|error| (id, failure(ErrorKind::Invalid, format!("not a request: {error}"))))
}

/// What an oversized line is answered with.
#[must_use]
pub fn too_long() -> String {
    format!("request line longer than {} bytes", proto::MAX_LINE)
}

/// A failure without a hint.
#[must_use]
pub fn failure(kind: ErrorKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into(), hint: None }
}

/// Append one response line. One that no client would accept becomes an error reply of the same id.
pub fn encode(id: u64, body: Body, out: &mut Vec<u8>) {
    let start = out.len();
    let response = Response { v: PROTOCOL_VERSION, id, body };
    serde_json::to_writer(&mut *out, &response)
        .expect("wire types have only string keys, and a Vec takes all");
    out.push(b'\n');
    if out.len() - start > proto::MAX_RESPONSE {
        out.truncate(start);
        let failure = failure(ErrorKind::Limit, "reply too long for a line");
        encode(id, Body::Error(failure), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: &str) -> (u64, ErrorKind) {
        let (id, failure) = parse(line.as_bytes()).expect_err(line);
        (id, failure.kind)
    }

    #[test]
    fn a_whole_request_is_understood() {
        let request = parse(b"{\"v\":1,\"id\":7,\"call\":{\"show\":{\"job\":3}}}\n").expect("parses");
        assert_eq!(request, Request { v: 1, id: 7, call: proto::Call::Show { job: 3 } });
    }

    #[test]
    fn the_version_is_judged_before_anything_unknown() {
        assert_eq!(refusal(r#"{"v":2,"id":7,"new":1,"call":{"teleport":{}}}"#), (7, ErrorKind::Version));
        assert_eq!(refusal(r#"{"v":1,"id":7,"new":1,"call":{"hello":{}}}"#), (7, ErrorKind::Invalid));
    }

    #[test]
    fn hello_is_legal_in_every_version() {
        let request = parse(br#"{"v":99,"id":7,"call":{"hello":{"name":"later"}}}"#).expect("legal");
        assert_eq!(request.call, proto::Call::Hello {});
        assert_eq!(request.id, 7);
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_id_where_it_can_be_read() {
        assert_eq!(refusal(""), (0, ErrorKind::Invalid));
        assert_eq!(refusal("[]"), (0, ErrorKind::Invalid));
        assert_eq!(refusal(r#"{"id":3}"#), (3, ErrorKind::Invalid));
        assert_eq!(refusal(r#"{"v":"1","id":3}"#), (3, ErrorKind::Invalid));
        assert_eq!(refusal(r#"{"v":1,"id":-3,"call":{"list":{}}}"#), (0, ErrorKind::Invalid));
        assert_eq!(refusal(r#"{"v":1,"id":3,"call":{"teleport":{}}}"#), (3, ErrorKind::Invalid));
        assert_eq!(refusal(r#"{"v":1,"id":3,"id":4,"call":{"list":{}}}"#), (4, ErrorKind::Invalid));
        assert_eq!(refusal(&"[".repeat(60_000)), (0, ErrorKind::Invalid));
        assert_eq!(refusal(&" ".repeat(proto::MAX_LINE + 1)), (0, ErrorKind::Limit));
    }

    #[test]
    fn a_reply_that_fits_no_line_becomes_an_error() {
        let mut out = b"before\n".to_vec();
        encode(5, Body::Error(failure(ErrorKind::Internal, "x".repeat(proto::MAX_RESPONSE))), &mut out);
        let text = String::from_utf8(out).expect("json");
        let response: Response =
            serde_json::from_str(text.strip_prefix("before\n").expect("kept")).expect("json");
        assert!(matches!(
            response,
            Response { id: 5, body: Body::Error(Failure { kind: ErrorKind::Limit, .. }), .. }
        ));
    }
}
