class DeviceCapability:
    def to_int(self) -> int: ...

class Platform:
    device_name: str

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None: ...
    def is_cuda(self) -> bool: ...

current_platform: Platform
