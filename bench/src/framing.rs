//! gRPC's framing of messages in a stream of bytes. Before each message there are a compression
//! flag, which is never set here, and the message's length.

use std::mem;

use anyhow::{Result, ensure};
use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

/// The bytes of the flag and the length.
const PREFIX: usize = 5;

/// Encodes messages into one piece of bytes.
pub(crate) fn encode<M: Message>(messages: impl IntoIterator<Item = M>) -> Result<Bytes> {
    let mut bytes = Vec::new();
    for message in messages {
        let length = message.encoded_len();
        bytes.reserve(PREFIX + length);
        bytes.push(0);
        bytes.extend(u32::try_from(length)?.to_be_bytes());
        message.encode(&mut bytes)?;
    }
    Ok(bytes.into())
}

/// Bytes that have been received and not yet decoded.
#[derive(Debug, Default)]
pub(crate) struct Received(Bytes);

impl Received {
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if self.0.is_empty() {
            // The usual case needs no copy.
            self.0 = bytes;
        } else {
            // This copies once. After that the buffer has one owner, and grows in place.
            let mut joined = BytesMut::from(mem::take(&mut self.0));
            joined.extend_from_slice(&bytes);
            self.0 = joined.freeze();
        }
    }

    /// Decodes the next message; `None` until all of it has been received.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>> {
        let Some((prefix, rest)) = self.0.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let [compressed, length @ ..] = *prefix;
        ensure!(compressed == 0, "a compressed message");
        let length = usize::try_from(u32::from_be_bytes(length))?;
        if rest.len() < length {
            return Ok(None);
        }
        self.0.advance(PREFIX);
        Ok(Some(M::decode(self.0.split_to(length))?))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> Vec<String> {
        vec!["one".to_owned(), String::new(), "x".repeat(1000)]
    }

    fn decode_all(received: &mut Received) -> Vec<String> {
        std::iter::from_fn(|| received.next().expect("well formed")).collect()
    }

    #[test]
    fn messages_in_one_piece_are_decoded() {
        let mut received = Received::default();
        received.push(encode(texts()).expect("short"));
        assert_eq!(decode_all(&mut received), texts());
        assert!(received.is_empty());
    }

    #[test]
    fn messages_in_pieces_of_any_length_are_decoded() {
        let bytes = encode(texts()).expect("short");
        for length in 1..bytes.len() {
            let (mut received, mut decoded) = (Received::default(), Vec::new());
            for piece in bytes.chunks(length) {
                received.push(bytes.slice_ref(piece));
                decoded.extend(decode_all(&mut received));
            }
            assert_eq!(decoded, texts(), "in pieces of {length}");
            assert!(received.is_empty());
        }
    }

    #[test]
    fn a_compressed_or_malformed_message_is_refused() {
        for bytes in [[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0xff]] {
            let mut received = Received::default();
            received.push(Bytes::copy_from_slice(&bytes));
            assert!(received.next::<String>().is_err(), "{bytes:?}");
        }
    }
}
