//! Encodes messages by prost, with buffers of the size that this API's messages have.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// The first size of a call's buffers, in bytes. They grow as needed. tonic's default is 8 KiB each
/// for the request and the response, which is most of the memory of an idle stream or a short call.
const FIRST_BYTES: usize = 512;
/// How many bytes of encoded messages are passed to the connection at a time. This is tonic's
/// default.
const YIELD_BYTES: usize = 32 * 1024;

/// The codec of the generated stubs, for any message of prost.
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
