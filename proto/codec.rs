//! How messages become bytes: prost's encoding, with buffers of the size that messages here have.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// What a call's buffers hold at first, in bytes; they grow with what they are given. tonic's own 8 KiB, once for the
/// request and once for the response, are most of the memory of an idle stream and of a short call.
const FIRST_BYTES: usize = 512;
/// Encoded messages that are handed to the connection in one go, in bytes; as tonic has it.
const YIELD_BYTES: usize = 32 * 1024;

/// The codec of the generated stubs. It takes any message of prost.
#[derive(Debug, Clone)]
pub struct SmallBuffers<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(FIRST_BYTES, YIELD_BYTES))
    }
}
