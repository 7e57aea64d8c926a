"""A message as Flower sends it: announced first, the objects that it is made of after that."""

from fanformer.community.flower.content import flower


def take_apart(message):
    """Return a message's head with the tree of its objects, and the bytes of these by name."""
    objects = flower("supercore.inflatable.inflatable_object")
    with objects.no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        head = flower("common.serde").message_to_proto(flower("app.message").remove_content_from_message(message))
        parts = objects.get_all_nested_objects(message)
        return (head, objects.get_object_tree(message)), {name: part.deflate() for name, part in parts.items()}
