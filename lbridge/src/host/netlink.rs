//! Requests to the kernel over netlink that are answered with a list or an acknowledgement.

use std::{fmt::Debug, io};

use netlink_packet_core::{NetlinkDeserializable, NetlinkMessage, NetlinkPayload, NetlinkSerializable};
use netlink_sys::{Socket, SocketAddr};

/// Enough for any datagram of a list: the kernel makes them at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Opens a socket that speaks one of netlink's protocols with the kernel.
///
/// # Errors
///
/// Those of socket(2) and bind(2).
pub fn connect(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends a request.
///
/// # Errors
///
/// Those of send(2).
pub fn send<T: NetlinkSerializable + Debug>(
    socket: &Socket,
    mut message: NetlinkMessage<T>,
) -> io::Result<()> {
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    Ok(())
}

/// Hands over what is answered, to the list's end or to the acknowledgement of a request without one.
///
/// # Errors
///
/// The kernel's answer, if it is an error; an answer that cannot be understood.
pub fn receive<T: NetlinkDeserializable + Debug>(socket: &Socket, mut each: impl FnMut(T)) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        // netlink-sys takes a `BufMut` and fills what is free of it.
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        let mut rest = &buffer[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => each(inner),
                // A protocol without a module has its error at the end of an empty list.
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}
